"""Exceptions of three kinds: memory ran out, or the device failed, or neither."""

import pytest
import torch

from calotype_server.engine.memory import is_device_failure, is_out_of_memory, release_cached_memory
from support.engine.device_errors import EXHAUSTED, FAILED, OTHER


def caused_by(cause):
    """Returns an exception of a library that hides its cause."""
    error = ValueError("The model failed.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("wrap", [lambda error: error, caused_by], ids=["itself", "as a cause"])
class TestKinds:
    """Each exception is of one kind, also as the cause of another exception."""

    @pytest.mark.parametrize("error", EXHAUSTED, ids=str)
    def test_exhausted_memory(self, error, wrap):
        """Exhausted memory is recognised from every backend and library, and is no failure of the device."""
        assert is_out_of_memory(wrap(error))
        assert not is_device_failure(wrap(error))

    @pytest.mark.parametrize("error", FAILED, ids=str)
    def test_failed_devices(self, error, wrap):
        """A failed device is recognised, and is not taken for exhausted memory."""
        assert is_device_failure(wrap(error))
        assert not is_out_of_memory(wrap(error))

    @pytest.mark.parametrize("error", OTHER, ids=str)
    def test_other_errors(self, error, wrap):
        """Other errors are neither, even if they quote the words."""
        assert not is_out_of_memory(wrap(error))
        assert not is_device_failure(wrap(error))


def test_exceptions_that_cause_each_other():
    """A cycle of causes ends."""
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_cache_of_the_device_is_emptied(kind, monkeypatch):
    """Memory is returned to the device that the model uses, and to no other."""
    emptied = []
    for each in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(getattr(torch, each), "empty_cache", lambda each=each: emptied.append(each))
    release_cached_memory(torch.device("cpu"))
    release_cached_memory(torch.device(kind))
    assert emptied == [kind]


def test_memory_that_cannot_be_released_stops_nothing(monkeypatch, logs):
    """Torch may refuse for reasons of its own; only a failed device is raised."""
    error = RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def refuse():
        raise error

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    release_cached_memory(torch.device("cuda", 1))
    assert [line["event"] for line in logs] == ["cached memory cannot be released"]
    error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    with pytest.raises(torch.AcceleratorError):
        release_cached_memory(torch.device("cuda", 1))
