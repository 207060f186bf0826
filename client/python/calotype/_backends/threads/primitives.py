"""The threading primitives that the client uses. `aio.primitives` has the same names for asyncio."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from ..._channel import PROBE_TIMEOUT_SECONDS
from ...v1 import calotype_pb2 as v1
from ...v1.calotype_pb2_grpc import GenerationServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from ..._channel import Metadata, Options

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

Lock = threading.Lock
"""Held while waiting for a message."""

StateLock = threading.RLock
"""Protects fields against other threads. Reentrant: the garbage collector may leave a generation at any time."""

Event = threading.Event

Channel: TypeAlias = grpc.Channel
Call: TypeAlias = "grpc._CallIterator[v1.Progress]"
Stub: TypeAlias = GenerationServiceStub


def connect(target: str, credentials: grpc.ChannelCredentials | None, options: Options) -> Channel:
    """Makes a channel."""
    if credentials is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, credentials, options)


def make_stub(channel: Channel) -> GenerationServiceStub:
    """Makes the stub of a channel."""
    return GenerationServiceStub(channel)


def run_blocking(function: Callable[[str], list[tuple[str, str]]], argument: str) -> list[tuple[str, str]]:
    """Calls a function that blocks."""
    return function(argument)


def ask_models(stubs: Sequence[Stub], metadata: Metadata) -> Generator[tuple[str, Stub]]:
    """Asks all servers for their model in parallel. Yields `Model.replica` and the stub of each server that answers."""
    answers: SimpleQueue[tuple[Any, Stub]] = SimpleQueue()
    for stub in stubs:
        call: Any = stub.GetModel.future(v1.GetModelRequest(), timeout=PROBE_TIMEOUT_SECONDS, metadata=metadata)
        call.add_done_callback(lambda call, stub=stub: answers.put((call, stub)))
    for _ in stubs:
        call, stub = answers.get()
        if call.code() is grpc.StatusCode.OK:
            yield call.result().replica, stub
