"""Compiled denoisers. Most tests use a backend that traces as usual, but generates no code."""

import os

import diffusers
import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.requests.sample_calls import sample_calls
from calotype_server.engine.runtime.check import difference
from calotype_server.engine.runtime.compiled import CompiledRuntime
from calotype_server.engine.runtime.eager import EagerRuntime
from support.engine import tiny


@pytest.fixture(autouse=True)
def _compiler(monkeypatch):
    """Forgets compiled code, and restores the environment."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    yield
    torch.compiler.reset()


class Block(torch.nn.Module):
    """A block of the transformer; adds the timestep."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, rows, timestep):
        return self.linear(rows).tanh() + timestep.reshape(-1, 1, 1)


class Transformer(diffusers.ModelMixin):
    """Two blocks, for tokens with four numbers."""

    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block() for _ in range(2)])

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep)
        return (hidden_states,)


class Backend:
    """Runs traced graphs without generating code, and counts their calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.calls += 1
            return graph(*args)

        return run


def bound(runtime, rows, length=6):
    """Returns a call."""
    tokens = torch.randn(rows, length, 4, generator=torch.Generator().manual_seed(rows))
    return runtime.collator.bind((tokens, torch.tensor(0.5)), {}, {})


def compilations(call):
    """Returns how many graphs a call compiles."""
    torch._dynamo.utils.counters.clear()
    call()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_blocks_of_a_transformer_are_compiled_for_any_number_of_rows(tmp_path):
    """After calls of one and two rows, nothing more is compiled; the module itself stays plain."""
    runtime = CompiledRuntime(Transformer(), exact=False, cache_dir=tmp_path, backend=Backend())
    eager = EagerRuntime(runtime.module)
    assert compilations(lambda: [runtime.run([bound(runtime, rows)], rows) for rows in (1, 2)]) == 2
    for rows in (1, 2, 3, 4, 7):
        answers = []
        call = bound(runtime, rows)
        assert not compilations(lambda call=call, answers=answers: answers.append(runtime.run([call], call.rows)))
        assert torch.equal(answers[0][0], eager.run([call], rows)[0])
    assert all(part._compiled_call_impl is None for part in runtime.module.modules())


@torch.no_grad()
def test_nothing_is_compiled_after_loading(tmp_path):
    """Known sizes still use compiled code. A new size runs eagerly, without delay for the other requests."""
    backend = Backend()
    runtime = CompiledRuntime(Transformer(), exact=False, cache_dir=tmp_path, backend=backend)
    known, new = bound(runtime, 2), bound(runtime, 2, length=9)
    runtime.run([known], 2)
    runtime.end_loading()
    backend.calls = 0
    assert not compilations(lambda: [runtime.run([call], 2) for call in (new, known)])
    assert backend.calls == 2  # one for each block
    assert torch.equal(runtime.run([new], 2)[0], EagerRuntime(runtime.module).run([new], 2)[0])


@torch.no_grad()
def test_code_that_is_compiled_too_often_raises(tmp_path):
    """The compiler would silently run it eagerly; the exception lets the server report plain calls instead."""

    class Choosy(torch.nn.Module):
        def forward(self, sample, timestep, return_dict=True):
            return (sample * len(return_dict),)

    runtime = CompiledRuntime(Choosy(), exact=False, cache_dir=tmp_path, backend=Backend())
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for number in range(20):
            call = runtime.collator.bind((torch.ones(2, 4), torch.tensor(0.5), "x" * number), {}, {})
            runtime.run([call], 2)


def test_unets_are_compiled_whole(sd15):
    """The repeated blocks of a UNet are its transformers only, which would leave most layers as they are."""
    from calotype_server.engine.runtime import compiled

    assert isinstance(sd15.unet, diffusers.UNet2DConditionModel)
    assert not compiled._repeated_blocks(sd15.unet)
    assert compiled._repeated_blocks(tiny.shared("flux").transformer)


@pytest.mark.parametrize("given", [None, default_cache_dir(), "/elsewhere"])
def test_compiled_code_is_cached_below_the_cache_folder(tmp_path, monkeypatch, given):
    """The compiler's cache is in the server's, unless the operator set a folder; torch sets its default by itself."""
    if given is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
    CompiledRuntime(torch.nn.Linear(1, 1), exact=False, cache_dir=tmp_path)
    expected = given if given == "/elsewhere" else str(tmp_path / "inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@torch.no_grad()
def test_generated_code_gives_the_models_answers(tmp_path, exact):
    """On a CPU, the default backend generates C++, whose answers equal the model's up to rounding."""
    pipeline = tiny.prompted("flux")
    calls = sample_calls(pipeline, describe("flux", pipeline, Defaults(step_count=3)))
    runtime = CompiledRuntime(pipeline.transformer, exact=exact, cache_dir=tmp_path)
    assert difference(runtime, EagerRuntime(pipeline.transformer), calls) is None
    assert any((tmp_path / "inductor").iterdir())
