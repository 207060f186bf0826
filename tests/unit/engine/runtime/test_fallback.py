"""Errors of an accelerator while the server runs."""

import weakref

import pytest
import torch

from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.runtime.fallback import FallbackRuntime
from support.engine.batching import Denoiser, answer_to, sample
from support.engine.runtimes import AlteredRuntime


def failing(error, module=None):
    """Returns a runtime whose accelerator raises an error in its second call, and that accelerator."""
    module = module or Denoiser()

    def alter(answer, _):
        if error is not None and len(accelerated.rows) == 2:
            raise error
        return answer

    accelerated = AlteredRuntime(module, alter=alter)
    changes = []
    runtime = FallbackRuntime(accelerated, EagerRuntime(module), lambda: changes.append(1))
    return runtime, accelerated, changes


def run(runtime, value=1):
    """Makes a call of one row."""
    call = runtime.collator.bind((sample(value), torch.tensor(0)), {}, {})
    return runtime.run([call], 1)[0]


def test_an_error_ends_the_accelerator_for_good(logs):
    """The call that fails gets the plain answer, all later calls are plain, and one line is logged."""
    runtime, accelerated, changes = failing(ValueError("lost"))
    for value in range(5):
        assert torch.equal(run(runtime, value), answer_to(value, 0))
    assert accelerated.rows == [1, 1]
    assert (runtime.name, runtime.failure) == ("none", "The accelerator graphs failed.")
    assert [line["event"] for line in logs] == ["the accelerator failed and is not used any more"]
    assert (len(changes), accelerated.freed) == (1, 1)


def test_an_error_of_the_request_is_raised(logs):
    """If plain calls fail too, the request is the cause: the accelerator stays in use."""

    def act(rows):
        if rows[0, 0] == 13:
            raise ZeroDivisionError

    runtime, _, changes = failing(None, Denoiser(act))
    with pytest.raises(ZeroDivisionError):
        run(runtime, 13)
    assert torch.equal(run(runtime), answer_to(1, 0))
    assert (runtime.name, runtime.failure, changes, logs) == ("graphs", "", [], [])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), torch.AcceleratorError("device lost")]
)
def test_memory_and_device_errors_are_raised(error):
    """The batcher reacts to exhausted memory and to a lost device; both say nothing about the accelerator."""
    runtime, accelerated, _ = failing(error)
    run(runtime)
    with pytest.raises(type(error)):
        run(runtime)
    assert runtime.name == "graphs"
    assert len(accelerated.rows) == 2


@pytest.mark.parametrize("clean", [FallbackRuntime.clear, FallbackRuntime.free_memory])
def test_an_accelerator_that_cannot_clean_up_is_not_used_any_more(clean, logs):
    """Neither the thread that asks for memory nor a call ends with the error; a failed device is raised."""
    runtime, accelerated, changes = failing(None)
    error = RuntimeError("no")

    def fail():
        raise error

    accelerated.clear = accelerated.free_memory = fail
    assert not clean(runtime)
    assert not clean(runtime)
    assert torch.equal(run(runtime), answer_to(1, 0))
    assert (runtime.name, len(changes), len(logs)) == ("none", 1, 1)
    error = torch.AcceleratorError("device lost")
    with pytest.raises(torch.AcceleratorError):
        clean(runtime)


def test_the_plain_answer_survives_an_accelerator_that_cannot_clean_up():
    """The call that meets the error gets its answer."""
    runtime, accelerated, changes = failing(ValueError("lost"))
    accelerated.clear = lambda: 1 / 0
    assert all(torch.equal(run(runtime, value), answer_to(value, 0)) for value in range(3))
    assert len(changes) == 1


def test_nothing_of_a_failed_call_is_alive_in_the_plain_one():
    """The plain call may need the memory of the accelerator's intermediate results."""
    seen, alive = [], []

    def act(_):
        alive.extend(reference() is not None for reference in seen)

    def alter(answer, _):
        activation = answer[0] + 1
        seen.append(weakref.ref(activation))
        raise ValueError

    module = Denoiser(act)
    runtime = FallbackRuntime(AlteredRuntime(module, alter=alter), EagerRuntime(module))
    assert torch.equal(run(runtime), answer_to(1, 0))
    assert alive == [False]
