"""The asyncio primitives that the client uses. `threads.primitives` has the same names for threads."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import grpc.aio

from ..._channel import PROBE_TIMEOUT_SECONDS
from ...v1 import calotype_pb2 as v1
from ...v1.calotype_pb2_grpc import GenerationServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from ..._channel import Metadata, Options
    from ...v1.calotype_pb2_grpc import GenerationServiceAsyncStub

__all__ = [
    "Call",
    "Channel",
    "Event",
    "Lock",
    "StateLock",
    "Stub",
    "ask_models",
    "connect",
    "make_stub",
    "run_blocking",
]

Lock = asyncio.Lock
"""Held while waiting for a message."""

StateLock = nullcontext
"""Protects fields against other threads. Does nothing here: only the event loop's thread uses an asyncio client."""

Channel: TypeAlias = grpc.aio.Channel
Call: TypeAlias = "grpc.aio.UnaryStreamCall[Any, v1.Progress]"
Stub: TypeAlias = "GenerationServiceAsyncStub"


class Event:
    """An `asyncio.Event` whose `wait` takes a timeout."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """Ends every wait."""
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Waits up to `seconds`. Returns whether the event is set."""
        try:
            async with asyncio.timeout(seconds):
                return await self._event.wait()
        except TimeoutError:
            return self._event.is_set()


def connect(target: str, credentials: grpc.ChannelCredentials | None, options: Options) -> Channel:
    """Makes a channel. It belongs to the running event loop."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, credentials, options)


def make_stub(channel: Channel) -> GenerationServiceAsyncStub:
    """Makes the stub of a channel."""
    return GenerationServiceStub(channel)


async def run_blocking(function: Callable[[str], list[tuple[str, str]]], argument: str) -> list[tuple[str, str]]:
    """Calls a function that blocks, in another thread."""
    return await asyncio.get_running_loop().run_in_executor(None, function, argument)


async def ask_models(stubs: Sequence[Stub], metadata: Metadata) -> AsyncGenerator[tuple[str, Stub]]:
    """Asks all servers for their model in parallel. Yields `Model.replica` and the stub of each server that answers."""
    tasks = [asyncio.ensure_future(_ask_model(stub, metadata)) for stub in stubs]
    try:
        for answer in asyncio.as_completed(tasks):
            if (replica := await answer) is not None:
                yield replica
    finally:
        for task in tasks:
            task.cancel()


async def _ask_model(stub: Stub, metadata: Metadata) -> tuple[str, Stub] | None:
    try:
        model = await stub.GetModel(v1.GetModelRequest(), timeout=PROBE_TIMEOUT_SECONDS, metadata=metadata)
    except grpc.RpcError:
        return None
    return model.replica, stub
