"""Random requests on a real batcher with real threads: none hangs, and each gets its own answers."""

import dataclasses
import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype_server.engine.tap import Stopped
from support.engine.batching import Callers, answer_to
from support.runs import PATIENCE

MAX_ROWS = 5
POISON, TOO_LARGE = 1000, 2000
OUTCOMES = (
    "succeeds",
    "succeeds",
    "raises",
    "is cancelled",
    "is cancelled by another thread",
    "breaks its batch",
    "is too large",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """A request, and what happens to it at step `at`."""

    steps: int
    rows: int
    width: int
    outcome: str
    at: int


requests = st.builds(
    Request,
    steps=st.integers(1, 6),
    rows=st.integers(1, 3),
    width=st.sampled_from([2, 4]),
    outcome=st.sampled_from(OUTCOMES),
    at=st.integers(0, 5),
)


def act(rows):
    """Fails if the rows of any request in the batch ask for it."""
    if (rows == POISON).any():
        raise ValueError("poisoned")
    if (rows == TOO_LARGE).any():
        raise torch.OutOfMemoryError("CUDA out of memory.")


def run(callers, number, request):
    """Makes all steps, checks each answer, and returns the type of the exception that ended them, or None."""
    try:
        with callers.batcher.open_session() as session:
            for step in range(request.steps):
                value = number
                if step == request.at:
                    if request.outcome == "raises":
                        raise RuntimeError("failure of the request itself")
                    if request.outcome == "is cancelled":
                        session.cancel()
                    if request.outcome == "is cancelled by another thread":
                        threading.Thread(target=session.cancel).start()
                    value = {"breaks its batch": POISON, "is too large": TOO_LARGE}.get(request.outcome, number)
                answer = callers.step(session, value, step, request.rows, request.width)
                assert torch.equal(answer, answer_to(number, step, request.rows, request.width))
            session.expect_no_more()
    except (RuntimeError, ValueError, Stopped) as error:
        return type(error)
    return None


def expected(request):
    """Returns the exceptions that may end a request."""
    if request.at >= request.steps:
        return {None}
    return {
        "succeeds": {None},
        "raises": {RuntimeError},
        "is cancelled": {Stopped},
        "is cancelled by another thread": {Stopped, None},
        "breaks its batch": {ValueError},
        "is too large": {torch.OutOfMemoryError},
    }[request.outcome]


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=1, max_size=12), st.booleans())
def test_each_request_ends_as_expected(mixture, deterministic):
    """Concurrent requests that raise, end, exhaust memory or break a batch at any step do not affect each other."""
    with Callers(act, max_rows=MAX_ROWS, deterministic=deterministic) as callers:
        futures = [callers.start(run, callers, number, request) for number, request in enumerate(mixture)]
        for request, future in zip(mixture, futures, strict=True):
            assert future.result(PATIENCE) in expected(request)
        assert not callers.batcher._scheduler.waiting
        assert not callers.batcher._scheduler.expected
        assert 1 <= callers.batcher.max_rows <= MAX_ROWS
    assert all(record.padded_rows <= MAX_ROWS for record in callers.records)
    served = sum(request.steps for request in mixture if expected(request) == {None})
    assert sum(len(record.sessions) for record in callers.records) >= served
