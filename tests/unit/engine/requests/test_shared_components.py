"""Components that several requests use at once keep the requests apart."""

import concurrent.futures
import sys
import threading
import time
import types
from typing import Any

import pytest
import torch

from calotype_server.engine.requests.shared_components import Locked, shared_components
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler
from support.engine import tiny, tiny_inputs
from support.runs import PATIENCE

THREADS = 8


@pytest.fixture
def _hasty():
    """Makes the interpreter switch threads as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(function, count=THREADS):
    """Returns the results of a function called with 0, 1, ... by threads that start together."""
    start = threading.Barrier(count)

    def run(number):
        torch.set_num_threads(1)
        start.wait(PATIENCE)
        return function(number)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(run, number) for number in range(count)]]


@pytest.mark.usefixtures("_hasty")
class TestRaces:
    """Each of these components mixes up requests if it is shared without a lock."""

    def test_tokenizers(self):
        """Calls with and without padding and truncation do not see each other's settings."""
        pipeline = tiny.shared("sd15")
        tokenizer = shared_components(pipeline)["tokenizer"]
        text = "a prompt that is longer than ten tokens"

        def use(number):
            lengths = set()
            for _ in range(200):
                if number % 2:
                    lengths.add(len(tokenizer.tokenize(text)))
                else:
                    encoded = tokenizer(text, padding="max_length", truncation=True, max_length=10 + number)
                    lengths.add(len(encoded["input_ids"]))
            return lengths

        plain = len(pipeline.tokenizer.tokenize(text))
        assert in_threads(use) == [{plain} if number % 2 else {10 + number} for number in range(THREADS)]

    def test_stateful_vae(self):
        """Qwen-Image's autoencoder, which stores the features of a decode in itself, decodes correctly."""
        pipeline = tiny.shared("qwen_image")
        latents = [
            torch.randn(1, pipeline.vae.config.z_dim, 1, 8, 8, generator=torch.Generator().manual_seed(number))
            for number in range(THREADS)
        ]
        vae = shared_components(pipeline)["vae"]
        with torch.no_grad():
            expected = [pipeline.vae.decode(each).sample for each in latents]

        @torch.no_grad()
        def decode(number):
            return [vae.decode(latents[number]).sample for _ in range(3)]

        for number, decoded in enumerate(in_threads(decode)):
            assert all(torch.allclose(each, expected[number], atol=1e-5) for each in decoded)

    def test_one_at_a_time(self):
        """Only one thread at a time is inside a component, whichever method it calls."""
        inside = []

        def work(*_):
            inside.append(None)
            time.sleep(0)
            alone = len(inside) == 1
            inside.pop()
            return alone

        component = Locked(types.SimpleNamespace(decode=work, encode=work), threading.Lock())
        use = [component.decode, component.encode]
        assert all(in_threads(lambda number: all(use[number % 2]() for _ in range(100))))


def test_all_tokenizers_have_one_lock():
    """SDXL's two tokenizers share a lock, and the view gives the same result as the pipeline."""
    pipeline = tiny.shared("sdxl")
    shared = shared_components(pipeline)
    assert shared["tokenizer"]._lock is shared["tokenizer_2"]._lock is not shared["vae"]._lock
    scheduler = type(pipeline.scheduler).__name__
    call: dict[str, Any] = {"output_type": "pt", "steps": 2}
    picture = request_view(pipeline, make_scheduler(pipeline, scheduler), **shared)(
        **tiny_inputs.arguments("sdxl", **call)
    )[0]
    expected = request_view(pipeline, make_scheduler(pipeline, scheduler))(**tiny_inputs.arguments("sdxl", **call))[0]
    assert torch.equal(picture, expected)


def test_locked_components_look_like_the_real_ones():
    """Type, length and attributes are those of the component, and setting an attribute sets it there."""
    pipeline = tiny.build("sd15")
    shared = shared_components(pipeline)
    tokenizer = shared["tokenizer"]
    assert isinstance(tokenizer, type(pipeline.tokenizer))
    assert isinstance(shared["vae"], torch.nn.Module)
    assert (len(tokenizer), tokenizer.model_max_length) == (len(pipeline.tokenizer), 77)
    tokenizer.model_max_length = 50
    assert pipeline.tokenizer.model_max_length == 50
    assert tokenizer("a")["input_ids"] == pipeline.tokenizer("a")["input_ids"]


def test_the_end_of_one_request_does_not_offload_the_others(monkeypatch):
    """`maybe_free_model_hooks` finds no hooks in a view, so it offloads nothing."""
    pipeline = tiny.build("sd15")
    pipeline._all_hooks = [object()]
    monkeypatch.setattr(type(pipeline), "enable_model_cpu_offload", lambda *_, **__: pytest.fail("offloaded"))
    view = request_view(pipeline, make_scheduler(pipeline, "DDIMScheduler"), **shared_components(pipeline))
    view.maybe_free_model_hooks()


def test_an_overflowing_vae_is_converted_once():
    """A float16 VAE that needs float32 is converted once, as a copy, so no request converts it while others use it."""
    pipeline = tiny.build("sdxl")
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.to(torch.float16)
    vae = shared_components(pipeline)["vae"]
    assert (vae.dtype, pipeline.vae.dtype) == (torch.float32, torch.float16)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        decoded = vae.decode(latents, return_dict=False)[0]
        expected = pipeline.vae.to(torch.float32).decode(latents.float(), return_dict=False)[0]
    assert torch.equal(decoded, expected)


def test_an_overflowing_vae_decodes_in_tiles_too(monkeypatch):
    """If memory runs out, the converted copy uses smaller tiles: its settings are those that change."""
    pipeline = tiny.build("sdxl")
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.to(torch.float16)
    vae = shared_components(pipeline)["vae"]
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 128
    decode, tried = vae.decoder.forward, []

    def limited(sample, *args, **kwargs):
        tried.append(sample.shape[-1])
        if sample.shape[-1] > 8:
            raise torch.OutOfMemoryError
        return decode(sample, *args, **kwargs)

    monkeypatch.setattr(vae.decoder, "forward", limited)
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, 4, 16, 16).half(), return_dict=False)[0].shape[-1] == 128
    assert (tried[0], max(tried[1:])) == (16, 8)
    assert vae.tile_latent_min_size == 16
