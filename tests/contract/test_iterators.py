"""The number of async iterators between the event log and the native port."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING

from calotype.v1 import calotype_pb2 as pb
from calotype_server.generations.event_log import Subscription
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running

if TYPE_CHECKING:
    import pytest

MAX_ITERATORS = 5


async def test_at_most_five_iterators_are_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one adds a frame to every message, and a place where a disconnect can be lost."""
    stacks: list[list[str]] = []
    take = Subscription.take

    def recording_take(subscription: Subscription, state):
        stacks.append(_iterators_on_the_stack())
        return take(subscription, state)

    monkeypatch.setattr(Subscription, "take", recording_take)
    async with running(FakeEngine()) as service:
        await read_until(service.stub.Generate(pb.GenerateRequest(prompt="a red apple")), pb.PHASE_SUCCEEDED)
    # The first message is read before the stream is entered, the last one through all iterators.
    last = stacks[-1]
    assert last[-1] == "Subscription.__anext__"
    assert "GenerationServicer.Generate" in last
    assert len(last) <= MAX_ITERATORS, last


def _iterators_on_the_stack() -> list[str]:
    """Returns the names of the async generators and `__anext__` methods on the stack, outermost first."""
    found, frame = [], sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_flags & inspect.CO_ASYNC_GENERATOR or code.co_name == "__anext__":
            found.append(code.co_qualname)
        frame = frame.f_back
    return found[::-1]
