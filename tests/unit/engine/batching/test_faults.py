"""What goes wrong in one request stays with it; what goes wrong with the device reaches everybody."""

import gc
import threading
import weakref

import pytest
import torch

from calotype_server import errors
from support.engine.batching import Party, answer_to
from support.runs import PATIENCE

POISON = 13


def outcomes(futures):
    """The exception or the answer of each."""
    return [future.exception(0) or future.result(0) for future in futures]


def right(futures, *numbers):
    """Whether these have the answer that they would have had alone."""
    return all(torch.equal(futures[number].result(0), answer_to(number, 0)) for number in numbers)


@pytest.mark.parametrize("fault", [ValueError("poisoned"), SystemExit(3)])
def test_a_poisoned_request_fails_alone(fault):
    """Its rows make every batch fail that they are in; it gets the exception, and the others their answers."""

    def act(rows):
        if (rows == POISON).any():
            raise fault

    with Party(act) as party:
        futures = party.together((0,), (1,), (2,), (POISON,), (4,), (5,), (6,))
        assert outcomes(futures)[3] is fault
        assert right(futures, 0, 1, 2, 4, 5, 6)
        assert torch.equal(party.call(7), answer_to(7, 0))


def test_what_a_failed_call_computed_is_freed():
    """No traceback keeps activations, and no collector has to run to free them."""
    seen = []

    def act(rows):
        activation = rows + 1
        seen.append(weakref.ref(activation))
        raise ValueError("after a computation")

    with Party(act) as party:
        gc.disable()
        try:
            with pytest.raises(ValueError, match="after a computation"):
                party.call(1)
            assert [reference() for reference in seen] == [None]
        finally:
            gc.enable()


class TestMemory:
    """Memory that runs out costs speed, and no request."""

    @pytest.mark.parametrize(
        "fault",
        [
            torch.OutOfMemoryError("CUDA out of memory."),
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            MemoryError(),
        ],
    )
    def test_the_batch_is_halved_and_the_limit_kept(self, fault, logs):
        """Eight rows do not fit, four do: everybody is answered, and no batch is as large again."""

        def act(rows):
            if len(rows) > 4:
                raise fault

        with Party(act) as party:
            futures = party.together(*((number,) for number in range(8)))
            assert right(futures, *range(8))
            assert party.module.sizes == [8, 4, 4]
            assert party.batcher.max_rows == 4
            party.together(*((number,) for number in range(8)))
            assert party.module.sizes == [4, 4]
        assert ("memory ran out", 4) in [(entry["event"], entry.get("max_rows")) for entry in logs]

    def test_a_bucket_that_does_not_fit_is_halved_too(self):
        """It is the filling that does not fit: a request that is alone in its batch is answered all the same."""

        def act(rows):
            if len(rows) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        with Party(act, max_rows=16, deterministic=True) as party:
            assert torch.equal(party.call(1), answer_to(1, 0))
            assert right(party.together((0,), (1,), (2,)), 0, 1, 2)
            assert party.module.sizes == [4]
            assert party.batcher.max_rows == 4

    def test_the_limit_grows_back(self):
        """After a hundred batches without trouble one row more is tried, up to what was asked for."""
        plenty = threading.Event()

        def act(rows):
            if len(rows) > 1 and not plenty.is_set():
                raise torch.OutOfMemoryError

        with Party(act, max_rows=2) as party:
            party.together((0,), (1,))
            assert party.batcher.max_rows == 1
            plenty.set()
            limits = []
            for _ in range(250):
                party.call(1)
                limits.append(party.batcher.max_rows)
            assert limits[90] == 1
            assert set(limits[110:]) == {2}

    def test_a_request_that_never_fits_is_told(self):
        """Alone and still too large, it gets the error itself, and the limit of the others stays."""

        def act(rows):
            if len(rows) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        with Party(act, max_rows=4) as party:
            with pytest.raises(torch.OutOfMemoryError):
                party.call(1, 0, 6)
            assert party.batcher.max_rows == 4


def test_nan_stays_in_its_row():
    """Invalid numbers of one request do not reach the others."""
    with Party() as party:
        futures = party.together((float("nan"),), (1,), (2,))
        assert futures[0].result(0).isnan().all()
        assert right(futures, 1, 2)


def test_a_stalled_request_does_not_stop_the_others():
    """One request hangs in its own code between two steps, expected by all; the others run to their end."""
    release = threading.Event()

    def stalled(stream):
        with stream:
            party.step(stream, 1)
            assert release.wait(PATIENCE)
            return party.step(stream, 1)

    def request(value):
        with party.batcher.stream() as stream:
            return [party.step(stream, value, number) for number in range(5)]

    with Party() as party:
        slow = party.start(stalled, party.batcher.stream())
        others = [party.start(request, value) for value in (2, 3)]
        for value, other in zip((2, 3), others, strict=True):
            assert torch.equal(other.result(PATIENCE)[4], answer_to(value, 4))
        assert not slow.done()
        release.set()
        assert torch.equal(slow.result(PATIENCE), answer_to(1, 0))


class TestDevice:
    """A dead device is known to everybody, at once and for good."""

    def test_failure_of_the_device_reaches_all(self, logs):
        """Calls in the batch, calls that wait, and later calls all raise EngineDead; none hangs."""

        def act(rows):
            if (rows == POISON).any():
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        with Party(act, max_rows=2) as party:
            futures = party.together((POISON,), (1,), (2,))
            failures = outcomes(futures)
            assert [type(failure) for failure in failures] == [errors.EngineDead] * 3
            assert len({id(failure) for failure in failures}) == 3
            assert isinstance(failures[0].__cause__, torch.AcceleratorError)
            with pytest.raises(errors.EngineDead):
                party.call(3)
        assert "the device failed" in [entry["event"] for entry in logs]

    def test_the_device_thread_does_not_die_in_silence(self, monkeypatch, logs):
        """Even a mistake of the batcher's own is logged, and ends in EngineDead for those who wait."""
        with Party() as party:
            monkeypatch.setattr(party.batcher._rendezvous, "pick", lambda _: 1 / 0)
            for _ in range(2):
                with pytest.raises(errors.EngineDead):
                    party.call(1)
        assert "the device failed" in [entry["event"] for entry in logs]

    def test_a_mistake_in_joining_costs_only_speed(self, monkeypatch):
        """Calls that cannot be joined after all are run one by one."""
        with Party() as party:
            monkeypatch.setattr(party.batcher.collator, "_with_masks", lambda _: 1 / 0)
            futures = party.together((0,), (1,), (2,))
            assert right(futures, 0, 1, 2)
            assert party.module.sizes == [1, 1, 1]
