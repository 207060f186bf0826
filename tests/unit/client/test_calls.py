"""The calls of a client that closes meanwhile."""

from typing import Any

import pytest

from calotype import ClientClosed
from calotype._async.calls import AsyncCalls
from calotype._resume.backoff import RetryPolicy
from calotype._resume.policy import Resumption
from calotype._sync.calls import Calls
from calotype.v1 import calotype_pb2 as v1

ARGUMENTS: dict[str, Any] = {"credentials": None, "metadata": (), "policy": RetryPolicy(), "stall_timeout": None}


@pytest.fixture
def resumption():
    """A generation that is watched."""
    return Resumption(v1.WatchRequest(generation_id="g"), RetryPolicy())


def test_closed_client_makes_no_call_and_sends_no_cancel(resumption):
    """After close(), start() raises, also for a server found before, and send_cancel() does nothing."""
    calls = Calls("localhost:1", **ARGUMENTS)
    stub = calls.require_open()
    calls.close()
    with pytest.raises(ClientClosed):
        calls.start(resumption, stub)
    calls.send_cancel(resumption)


async def test_closed_asyncio_client_makes_no_call_and_sends_no_cancel(resumption):
    """The same holds for the asyncio client."""
    calls = AsyncCalls("localhost:1", **ARGUMENTS)
    stub = calls.require_open()
    await calls.close()
    with pytest.raises(ClientClosed):
        calls.start(resumption, stub)
    calls.send_cancel(resumption)
