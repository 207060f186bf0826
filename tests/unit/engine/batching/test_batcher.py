"""One thread runs the calls of concurrent requests together, and each request gets its own answer."""

import threading
from concurrent.futures import wait
from typing import Any

import pytest
import torch

from calotype_server import errors
from calotype_server.engine.batching.batcher import StepBatcher
from calotype_server.engine.batching.measure import Threads
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.tap import Stopped
from support.engine.batching import Callers, answer_to, sample
from support.runs import PATIENCE


@pytest.fixture
def callers():
    """Callers of a batcher whose denoiser never fails."""
    with Callers() as callers:
        yield callers


def values(futures):
    """Returns the answers of calls that succeeded."""
    return [future.result(0) for future in futures]


def test_waiting_calls_are_joined(callers):
    """Calls with different timesteps and numbers of rows share one batch, and each gets its own rows."""
    answers = values(callers.together((1, 10), (2, 20, 2), (3, 30)))
    assert callers.module.sizes == [4]
    for answer, expected in zip(answers, [answer_to(1, 10), answer_to(2, 20, 2), answer_to(3, 30)], strict=True):
        assert torch.equal(answer, expected)


def test_different_sizes_are_not_joined(callers):
    """Latents of different sizes run in different batches."""
    answers = values(callers.together((1, 0, 1, 4), (2, 0, 1, 6), (3, 0, 1, 4)))
    assert sorted(callers.module.sizes) == [1, 2]
    assert torch.equal(answers[1], answer_to(2, 0, 1, 6))


def test_a_session_can_stay_alone(callers):
    """Calls of a session for previews are not joined with those of requests, whose last bits would change."""
    batcher = callers.batcher
    sessions = [batcher.open_session(), batcher.open_session(alone=True), batcher.open_session()]
    with callers.held(3):
        futures = [callers.start(callers.step, session, value) for value, session in enumerate(sessions)]
    answers = [future.result(PATIENCE) for future in futures]
    assert sorted(callers.module.sizes) == [1, 2]
    assert all(torch.equal(answer, answer_to(value, 0)) for value, answer in enumerate(answers))


def test_a_batch_has_at_most_max_rows():
    """Calls that do not fit run in the order of arrival; a call with more than `max_rows` rows runs alone."""
    with Callers(max_rows=4) as callers:
        answers = values(callers.together(*((number, 0, 2) for number in range(5)), (9, 0, 6)))
        assert sorted(callers.module.sizes) == [2, 4, 4, 6]
        assert torch.equal(answers[5], answer_to(9, 0, 6))


def test_a_single_call_is_passed_through_unchanged():
    """A call that runs alone gets the same argument objects and the same answer object as a direct call."""
    seen = []
    result = (torch.zeros(1, 4),)

    class Module(torch.nn.Module):
        def forward(self, sample, timestep, mask=None):
            seen.append((sample, timestep, mask, torch.is_grad_enabled(), threading.current_thread().name))
            return result

    batcher = StepBatcher(EagerRuntime(Module()), max_rows=4)
    given, timestep, mask = torch.ones(1, 4), torch.tensor(3), torch.ones(1, 2)
    with batcher.open_session() as session:
        assert session.proxy()(given, timestep, mask=mask) is result
    batcher.close()
    assert all(a is b for a, b in zip(seen[0], (given, timestep, mask), strict=False))
    assert seen[0][3:] == (False, "calotype-device")


def test_requests_join_and_leave_at_any_step(callers):
    """Three requests of different lengths that start while another runs all get the right answers."""

    def request(value, steps, begin, began):
        assert begin.wait(PATIENCE)
        with callers.batcher.open_session() as session:
            for number in range(steps):
                assert torch.equal(callers.step(session, value, number), answer_to(value, number))
                if number == 1:
                    began.set()
        return True

    events = [threading.Event() for _ in range(4)]
    events[0].set()
    futures = [
        callers.start(request, value, steps, events[value], events[value + 1]) for value, steps in enumerate((9, 5, 3))
    ]
    assert all(future.result(PATIENCE) for future in futures)


def test_the_number_of_threads_depends_on_the_rows():
    """A call of many rows is computed with more threads than a call of few rows."""
    seen = []
    with Callers(lambda rows: seen.append((len(rows), torch.get_num_threads())), threads=Threads(2, 3, 4)) as callers:
        callers.call(1)
        values(callers.together((1,), (2, 0, 3)))
        callers.call(1)
    assert seen == [(1, 2), (1, 2), (4, 3), (1, 2)]


def test_batches_are_reported(callers):
    """The record of a batch has its start, its duration, its rows and the sessions that shared it."""
    values(callers.together((1,), (2, 0, 2)))
    callers.batcher.close()
    _, record = callers.records
    assert (record.rows, record.padded_rows, record.sessions) == (3, 3, (1, 2))
    assert record.started > 0
    assert record.seconds >= 0


def test_a_failing_listener_is_logged(logs):
    """An exception of the listener is logged, and the next call is served."""
    with Callers(on_batch=lambda _: 1 / 0) as callers:
        callers.call(1)
        assert torch.equal(callers.call(2), answer_to(2, 0))
    assert "a batch cannot be reported" in [entry["event"] for entry in logs]


def test_deterministic_batches_have_one_size():
    """Every batch is padded to the same number of rows, and no answer contains the padding."""
    with Callers(max_rows=5, deterministic=True) as callers:
        assert torch.equal(callers.call(1, 7), answer_to(1, 7))
        answers = values(callers.together((1, 10), (2, 20, 2)))
        assert torch.equal(answers[1], answer_to(2, 20, 2))
        assert set(callers.module.sizes) == {5}
    assert (callers.records[-1].rows, callers.records[-1].padded_rows) == (3, 5)


class TestCancel:
    """A cancelled request ends at once."""

    def test_a_waiting_call_ends_at_once(self, callers):
        """A cancelled call ends while the device is still busy, and the next batch runs without its rows."""
        session = callers.batcher.open_session()
        with callers.held(1):
            cancelled, other = callers.start(callers.step, session, 1), callers.start(callers.call, 2)
            callers.await_calls(2)
            session.cancel()
            assert isinstance(cancelled.exception(PATIENCE), Stopped)
        assert torch.equal(other.result(PATIENCE), answer_to(2, 0))
        assert callers.module.sizes == [1]

    def test_a_running_call_ends_at_once(self):
        """A cancelled call does not wait for the batch that computes its rows."""
        entered, release = threading.Event(), threading.Event()

        def act(rows):
            entered.set()
            assert release.wait(PATIENCE)

        with Callers(act) as callers:
            session = callers.batcher.open_session()
            cancelled = callers.start(callers.step, session, 1)
            assert entered.wait(PATIENCE)
            session.cancel()
            assert isinstance(cancelled.exception(PATIENCE), Stopped)
            release.set()
            assert torch.equal(callers.call(2), answer_to(2, 0))

    def test_the_next_call_of_a_cancelled_request_ends(self, callers):
        """A request that was cancelled between two calls, or should stop, does not reach the device again."""
        cancelled, stopping = callers.batcher.open_session(), callers.batcher.open_session(should_stop=lambda: True)
        cancelled.cancel()
        for session in (cancelled, stopping):
            with pytest.raises(Stopped):
                callers.step(session, 1)
        assert callers.module.sizes == []


class TestClose:
    """Closing ends the thread and releases all calls."""

    def test_waiting_calls_are_released(self, callers):
        """Calls that wait when the batcher closes raise `Draining`, and so do later calls."""
        with callers.held(2):
            futures = [callers.start(callers.call, value) for value in (1, 2)]
            callers.await_calls(2)
            closing = callers.start(callers.batcher.close)
            with callers.batcher._changed:
                assert callers.batcher._changed.wait_for(lambda: callers.batcher._closing, PATIENCE)
        closing.result(PATIENCE)
        for future in futures:
            assert isinstance(future.exception(PATIENCE), errors.Draining)
        with pytest.raises(errors.Draining):
            callers.call(3)

    def test_closing_twice_is_harmless(self, callers):
        """A second close does nothing."""
        callers.batcher.close()
        callers.batcher.close()


def test_no_thread_is_left_after_many_requests():
    """Two hundred requests that succeed, fail or are cancelled use one device thread, and no thread remains."""
    before = set(threading.enumerate())  # Some belong to other tests and may end meanwhile.

    def act(rows):
        if (rows == 13).any():
            raise ValueError("unlucky")

    def request(callers, number):
        with callers.batcher.open_session() as session:
            for step in range(1 + number % 3):
                if number % 7 == 3 and step == 1:
                    session.cancel()
                callers.step(session, 13 if number % 5 == 0 else number, step)
                if number % 11 == 4:
                    raise RuntimeError("failure of the request itself")

    with Callers(act, max_rows=6) as callers:
        futures = [callers.start(request, callers, number) for number in range(200)]
        assert not wait(futures, PATIENCE).not_done
        names = [thread.name for thread in set(threading.enumerate()) - before]
        assert names.count("calotype-device") == 1
    assert {type(future.exception()) for future in futures} == {type(None), ValueError, Stopped, RuntimeError}
    assert not set(threading.enumerate()) - before


def test_proxy_looks_like_the_module(callers):
    """Attributes are those of the module and read-only; its caches are not touched."""
    proxy: Any = callers.batcher.open_session().proxy()
    is_module = isinstance(proxy, torch.nn.Module)
    assert is_module
    assert proxy.sizes is callers.module.sizes
    with pytest.raises(AttributeError, match="shared by all requests"):
        proxy.sizes = []
    with proxy.cache_context("cond"):
        proxy._reset_stateful_cache()
    assert torch.equal(proxy.forward(sample(1), torch.tensor(2))[0], answer_to(1, 2))


def test_an_ended_request_is_not_expected(callers):
    """Other requests do not wait for a request whose session is closed."""
    with callers.batcher.open_session() as session:
        callers.step(session, 1)
        assert callers.batcher._scheduler.expected
    assert not callers.batcher._scheduler.expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_launches_do_not_run_ahead():
    """On CUDA at most two batches are launched and not yet computed."""
    module = torch.nn.Linear(4, 4).cuda()
    batcher = StepBatcher(EagerRuntime(module), max_rows=4)
    with batcher.open_session() as session, torch.no_grad():
        for value in range(5):
            latents = sample(value).cuda()
            assert torch.allclose(session.proxy()(latents), module(latents))
            assert len(batcher._runner._run_ahead._events) <= 2
    batcher.close()
