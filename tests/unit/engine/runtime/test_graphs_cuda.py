"""Real CUDA graphs: captured beside other threads, equal to the plain call, and freed when memory runs out."""

import threading

import pytest
import torch

from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.memory import is_out_of_memory
from calotype_server.engine.runtime.graphs import GraphsRuntime
from support.engine import tiny
from support.runs import PATIENCE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def cuda():
    """The device."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def unet(cuda):
    """A tiny UNet on the device."""
    pipeline = tiny.build("sd15")
    return getattr(pipeline, denoiser_name(pipeline)).to(cuda)


def calls(unet, count, rows=2):
    """Returns calls with different latents and timesteps."""
    width = unet.config.cross_attention_dim
    device = unet.device
    return [
        (
            (
                torch.randn(rows, unet.config.in_channels, 8, 8, device=device),
                torch.tensor(900 - 100 * number, device=device),
            ),
            {"encoder_hidden_states": torch.randn(rows, 7, width, device=device), "return_dict": False},
        )
        for number in range(count)
    ]


def started(unet, **options):
    """Returns a started runtime."""
    runtime = GraphsRuntime(unet, **{"exact": False, "max_rows": 4, **options})
    runtime.start()
    return runtime


def answer(runtime, call):
    """Returns the answer of a runtime to a call."""
    bound = runtime.collator.bind(*call, {})
    return runtime.collator.split(runtime.run([bound], bound.rows), [bound], bound.rows)[0][0]


@torch.no_grad()
@pytest.mark.parametrize("exact", [False, True])
def test_answers_equal_those_of_the_plain_call(unet, exact):
    """Replays equal the plain call bit for bit, with new latents and timesteps, and twice the same."""
    runtime = started(unet, exact=exact)
    kept = [(answer(runtime, call), call) for call in calls(unet, 6)]
    assert runtime.graph_count == 1
    for found, (args, kwargs) in kept:
        assert torch.equal(found, unet(*args, **kwargs)[0])
    call = calls(unet, 1)[0]
    assert torch.equal(answer(runtime, call), answer(runtime, call))


@torch.no_grad()
def test_other_threads_may_use_the_device_during_a_capture(unet, cuda):
    """A thread that allocates, copies and records events on its own stream does not break a capture."""
    stop, failures = threading.Event(), []

    def disturb():
        try:
            stream = torch.cuda.Stream(cuda)
            with torch.cuda.stream(stream):
                size = 1
                while not stop.is_set():
                    size = size % 64 + 1
                    held = torch.ones(size * 2**18, device=cuda)
                    held.sum().to("cpu", non_blocking=True)
                    event = torch.cuda.Event(blocking=True)
                    event.record()
                    event.synchronize()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    try:
        runtime = started(unet)
        for rows in (1, 2, 4):
            for args, kwargs in calls(unet, 3, rows):
                assert torch.equal(answer(runtime, (args, kwargs)), unet(*args, **kwargs)[0])
        assert runtime.graph_count == 3
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert failures == []


@torch.no_grad()
def test_memory_is_given_back(unet):
    """Freed graphs leave no reserved memory behind, and answers that were kept stay valid."""
    expected = [unet(*args, **kwargs)[0] for args, kwargs in calls(unet, 1)]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    runtime = started(unet)
    kept = [answer(runtime, call) for call in calls(unet, 4)]
    copies = [each.clone() for each in kept]
    assert runtime.free_memory()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    del kept, copies, expected
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # The stream of the captures keeps its workspace of cuBLAS.
    assert torch.cuda.memory_reserved() - before <= 64 * 2**20


@torch.no_grad()
def test_memory_that_runs_out_in_a_capture(unet, cuda, monkeypatch):
    """An allocation that never fits drops all graphs; the call is answered eagerly, and later captures work."""
    runtime = started(unet)
    for call in calls(unet, 3):
        answer(runtime, call)
    forward, captures = unet.forward, []

    def greedy(*args, **kwargs):
        if torch.cuda.is_current_stream_capturing() and not captures:
            captures.append(torch.empty(2**50, dtype=torch.uint8, device=cuda))
        return forward(*args, **kwargs)

    monkeypatch.setattr(unet, "forward", greedy)
    for args, kwargs in calls(unet, 3, rows=4):
        assert torch.equal(answer(runtime, (args, kwargs)), forward(*args, **kwargs)[0])
    assert runtime.graph_count == 0
    monkeypatch.setattr(unet, "forward", forward)
    other = started(unet)
    for call in calls(unet, 3):
        answer(other, call)
    assert other.graph_count == 1


@torch.no_grad()
@pytest.mark.parametrize("always", [True, False], ids=["noticed before", "only in the capture"])
def test_a_call_that_waits_for_the_device_runs_eagerly(unet, cuda, monkeypatch, always):
    """A capture that fails leaves the stream, the device and torch's cache of memory usable, also for other graphs."""
    forward = unet.forward

    def reading(sample, timestep, **kwargs):
        if always or torch.cuda.is_current_stream_capturing():
            timestep = torch.full_like(timestep, timestep.max().item())
        return forward(sample, timestep, **kwargs)

    monkeypatch.setattr(unet, "forward", reading)
    runtime = started(unet)
    stream = torch.cuda.current_stream()
    for rows in (1, 2, 4):
        for call in calls(unet, 3, rows):
            assert answer(runtime, call).isfinite().all()
    assert runtime.graph_count == 0
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    monkeypatch.setattr(unet, "forward", forward)
    other = started(unet)
    for call in calls(unet, 3):
        answer(other, call)
    assert other.graph_count == 1


def test_exhausted_memory_is_recognised(cuda):
    """Torch's error on this device counts as out of memory."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=cuda)
    assert is_out_of_memory(caught.value)
