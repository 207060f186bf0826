"""A failure of one request stays in that request; a failure of the device reaches all requests."""

import gc
import threading
import weakref

import pytest
import torch

from calotype_server import errors
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.failpoints import injected
from support.engine.batching import Callers, answer_to
from support.engine.device_errors import EXHAUSTED
from support.runs import PATIENCE

POISON = 13


def outcomes(futures):
    """Returns the exception or the answer of each call."""
    return [future.exception(0) or future.result(0) for future in futures]


def right(futures, *numbers):
    """Returns whether these calls have the same answers as alone."""
    return all(torch.equal(futures[number].result(0), answer_to(number, 0)) for number in numbers)


@pytest.mark.parametrize("fault", [ValueError("poisoned"), SystemExit(3)])
def test_a_request_that_breaks_its_batch_fails_alone(fault):
    """A request whose rows make every batch fail gets the exception, and the others get their answers."""

    def act(rows):
        if (rows == POISON).any():
            raise fault

    with Callers(act) as callers:
        futures = callers.together((0,), (1,), (2,), (POISON,), (4,), (5,), (6,))
        assert outcomes(futures)[3] is fault
        assert right(futures, 0, 1, 2, 4, 5, 6)
        assert torch.equal(callers.call(7), answer_to(7, 0))


def test_intermediate_results_of_a_failed_call_are_freed():
    """No traceback keeps activations alive, so they are freed without the garbage collector."""
    seen = []

    def act(rows):
        activation = rows + 1
        seen.append(weakref.ref(activation))
        raise ValueError("after a computation")

    with Callers(act) as callers:
        gc.disable()
        try:
            with pytest.raises(ValueError, match="after a computation"):
                callers.call(1)
            assert [reference() for reference in seen] == [None]
        finally:
            gc.enable()


class TestMemory:
    """Exhausted memory makes batches smaller and fails no request."""

    @pytest.mark.parametrize("fault", EXHAUSTED, ids=str)
    def test_the_batch_is_halved_and_the_limit_kept(self, fault, logs):
        """If eight rows do not fit but four do, all calls are answered, and later batches have at most four rows."""

        def act(rows):
            if len(rows) > 4:
                raise fault

        with Callers(act) as callers:
            futures = callers.together(*((number,) for number in range(8)))
            assert right(futures, *range(8))
            assert callers.module.sizes == [8, 4, 4]
            assert callers.batcher.max_rows == 4
            callers.together(*((number,) for number in range(8)))
            assert callers.module.sizes == [4, 4]
        assert ("memory ran out", 4) in [(entry["event"], entry.get("max_rows")) for entry in logs]

    def test_padding_that_does_not_fit_is_reduced(self):
        """A single request whose padded batch does not fit is answered with less padding."""

        def act(rows):
            if len(rows) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        with Callers(act, max_rows=16, deterministic=True) as callers:
            assert torch.equal(callers.call(1), answer_to(1, 0))
            assert right(callers.together((0,), (1,), (2,)), 0, 1, 2)
            assert callers.module.sizes == [4]
            assert callers.batcher.max_rows == 4

    def test_the_limit_grows_back(self):
        """After a hundred successful batches the limit rises by one row, up to the configured one."""
        plenty = threading.Event()

        def act(rows):
            if len(rows) > 1 and not plenty.is_set():
                raise torch.OutOfMemoryError

        with Callers(act, max_rows=2) as callers:
            callers.together((0,), (1,))
            assert callers.batcher.max_rows == 1
            plenty.set()
            limits = []
            for _ in range(250):
                callers.call(1)
                limits.append(callers.batcher.max_rows)
            assert limits[90] == 1
            assert set(limits[110:]) == {2}

    def test_memory_that_the_runtime_always_has_is_freed_once(self):
        """A runtime that prepares for the same batch again, and runs out of memory again, makes it smaller."""

        class Greedy(EagerRuntime):
            def free_memory(self):
                return True

        def act(rows):
            if len(rows) > 2:
                raise MemoryError

        with Callers(act, runtime=Greedy) as callers:
            futures = callers.together((0,), (1,), (2,), (3,))
            assert right(futures, 0, 1, 2, 3)
            assert callers.module.sizes == [4, 4, 2, 2]
            with pytest.raises(MemoryError):
                callers.call(1, 0, 6)

    def test_a_request_that_never_fits_fails(self):
        """A request that does not fit even alone gets the error, and the limit stays as it was."""

        def act(rows):
            if len(rows) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        with Callers(act, max_rows=4) as callers:
            with pytest.raises(torch.OutOfMemoryError):
                callers.call(1, 0, 6)
            assert callers.batcher.max_rows == 4


def test_nan_stays_in_its_row():
    """NaN in one request does not reach the other requests in the batch."""
    with Callers() as callers:
        futures = callers.together((float("nan"),), (1,), (2,))
        assert futures[0].result(0).isnan().all()
        assert right(futures, 1, 2)


def test_a_stalled_request_does_not_stop_the_others():
    """If one request hangs between two steps while others expect it, the others still finish."""
    release = threading.Event()

    def stalled(session):
        with session:
            callers.step(session, 1)
            assert release.wait(PATIENCE)
            return callers.step(session, 1)

    def request(value):
        with callers.batcher.open_session() as session:
            return [callers.step(session, value, number) for number in range(5)]

    with Callers() as callers:
        slow = callers.start(stalled, callers.batcher.open_session())
        others = [callers.start(request, value) for value in (2, 3)]
        for value, other in zip((2, 3), others, strict=True):
            assert torch.equal(other.result(PATIENCE)[4], answer_to(value, 4))
        assert not slow.done()
        release.set()
        assert torch.equal(slow.result(PATIENCE), answer_to(1, 0))


class TestDevice:
    """A failed device ends all current and later calls."""

    def test_failure_of_the_device_reaches_all(self, logs):
        """Calls in the batch, waiting calls and later calls all raise `EngineDead`; none hangs."""

        def act(rows):
            if (rows == POISON).any():
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        with Callers(act, max_rows=2) as callers:
            futures = callers.together((POISON,), (1,), (2,))
            failures = outcomes(futures)
            assert [type(failure) for failure in failures] == [errors.EngineDead] * 3
            assert len({id(failure) for failure in failures}) == 3
            assert isinstance(failures[0].__cause__, torch.AcceleratorError)
            with pytest.raises(errors.EngineDead):
                callers.call(3)
        assert "the device failed" in [entry["event"] for entry in logs]

    def test_a_bug_in_the_batcher_is_logged(self, monkeypatch, logs):
        """An exception in the batcher's own code is logged, and all calls raise `EngineDead`."""
        with Callers() as callers:
            monkeypatch.setattr(callers.batcher._scheduler, "pick", lambda _: 1 / 0)
            for _ in range(2):
                with pytest.raises(errors.EngineDead):
                    callers.call(1)
        assert "the device failed" in [entry["event"] for entry in logs]

    @pytest.mark.parametrize("failure", [SystemExit, GeneratorExit, MemoryError])
    def test_a_dead_thread_reaches_all(self, failure, logs):
        """If the device thread ends for any reason, current and later calls raise `EngineDead`."""

        def fail():
            raise failure

        with Callers() as callers, injected("engine.batch", fail):
            for _ in range(2):
                with pytest.raises(errors.EngineDead):
                    callers.call(1)
        assert "the device failed" in [entry["event"] for entry in logs]

    def test_calls_that_fail_to_join_run_one_by_one(self, monkeypatch):
        """If joining raises, each call runs alone and is answered."""
        with Callers() as callers:
            monkeypatch.setattr(callers.batcher.collator, "_with_masks", lambda _: 1 / 0)
            futures = callers.together((0,), (1,), (2,))
            assert right(futures, 0, 1, 2)
            assert callers.module.sizes == [1, 1, 1]
