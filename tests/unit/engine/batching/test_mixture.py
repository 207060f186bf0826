"""Requests of all fates on a real batcher with real threads: nothing is stuck, and everybody gets what is theirs."""

import dataclasses
import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype_server.engine.tap import Stopped
from support.engine.batching import Party, answer_to
from support.runs import PATIENCE

MAX_ROWS = 5
POISON, HUNGER = 1000, 2000
FATES = ("ends", "ends", "raises", "is cancelled", "is cancelled outside", "is poisoned", "is too large")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a request is like, and what becomes of it at a step."""

    steps: int
    rows: int
    width: int
    fate: str
    at: int


requests = st.builds(
    Request,
    steps=st.integers(1, 6),
    rows=st.integers(1, 3),
    width=st.sampled_from([2, 4]),
    fate=st.sampled_from(FATES),
    at=st.integers(0, 5),
)


def act(rows):
    """Fails as the rows ask for, whoever else is in the batch."""
    if (rows == POISON).any():
        raise ValueError("poisoned")
    if (rows == HUNGER).any():
        raise torch.OutOfMemoryError("CUDA out of memory.")


def run(party, number, request):
    """Takes all steps, each of which must have the right answer; returns how it ended."""
    try:
        with party.batcher.stream() as stream:
            for step in range(request.steps):
                value = number
                if step == request.at:
                    if request.fate == "raises":
                        raise RuntimeError("its own")
                    if request.fate == "is cancelled":
                        stream.cancel()
                    if request.fate == "is cancelled outside":
                        threading.Thread(target=stream.cancel).start()
                    value = {"is poisoned": POISON, "is too large": HUNGER}.get(request.fate, number)
                answer = party.step(stream, value, step, request.rows, request.width)
                assert torch.equal(answer, answer_to(number, step, request.rows, request.width))
            stream.expect_no_more()
    except (RuntimeError, ValueError, Stopped) as error:
        return type(error)
    return None


def expected(request):
    """The ways in which it may end."""
    if request.at >= request.steps:
        return {None}
    return {
        "ends": {None},
        "raises": {RuntimeError},
        "is cancelled": {Stopped},
        "is cancelled outside": {Stopped, None},
        "is poisoned": {ValueError},
        "is too large": {torch.OutOfMemoryError},
    }[request.fate]


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=1, max_size=12), st.booleans())
def test_everybody_ends_as_they_should(mixture, deterministic):
    """Requests come at once, and raise, vanish, starve memory or poison a batch at any step."""
    with Party(act, max_rows=MAX_ROWS, deterministic=deterministic) as party:
        futures = [party.start(run, party, number, request) for number, request in enumerate(mixture)]
        for request, future in zip(mixture, futures, strict=True):
            assert future.result(PATIENCE) in expected(request)
        assert not party.batcher._rendezvous.waiting
        assert not party.batcher._rendezvous._expected
        assert 1 <= party.batcher.max_rows <= MAX_ROWS
    assert all(record.padded_rows <= MAX_ROWS for record in party.records)
    served = sum(request.steps for request in mixture if expected(request) == {None})
    assert sum(len(record.streams) for record in party.records) >= served
