"""Several servers behind one target. gRPC balances new generations over them; here each can be reached alone.

What concerns one generation is for the server that has begun it, which `GetModel` tells: ids begin with its tag. All of
them are asked for theirs each time, in parallel. So nothing has to be kept in step with what runs where, and a server
that does not answer in time counts as gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import grpc

from ._channel import CHANNEL_OPTIONS
from .v1 import calotype_pb2 as v1
from .v1.calotype_pb2_grpc import GenerationServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from .v1.calotype_pb2_grpc import GenerationServiceAsyncStub

    Metadata = tuple[tuple[str, str], ...]

__all__ = ["AsyncReplicas", "Replicas", "is_balanced", "options", "resolve"]

_SERVICE = v1.DESCRIPTOR.services_by_name["GenerationService"].full_name
_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        # A server that is loading its model, or about to stop, gets no new generations:
        # https://github.com/grpc/grpc/blob/master/doc/health-checking.md
        "healthCheckConfig": {"serviceName": _SERVICE},
    }
)

_ANSWER_SECONDS = 2.0
"""For a server to tell its tag. One that is frozen does not, and one that is only late has its work done twice."""


def is_balanced(target: str) -> bool:
    """Whether a target of `parse_address` may stand for several servers."""
    scheme, _, rest = target.partition(":")
    return scheme == "dns" or (scheme in ("ipv4", "ipv6") and "," in rest)


def options(target: str) -> tuple[tuple[str, int | str], ...]:
    """Returns the options of a channel to a target."""
    return (*CHANNEL_OPTIONS, ("grpc.service_config", _SERVICE_CONFIG)) if is_balanced(target) else CHANNEL_OPTIONS


def resolve(target: str) -> list[tuple[str, str]]:
    """Returns a target and the authority, which a certificate is for, of each server behind a balanced one.

    Asks DNS, and may take as long as that does. Empty when it does not know.
    """
    scheme, _, rest = target.partition(":")
    if scheme != "dns":
        return [(f"{scheme}:{address}", address) for address in rest.split(",")]
    authority = rest.rpartition("/")[2]
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, "443"  # as gRPC does
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = dict.fromkeys(str(address[0]) for _, _, _, _, address in found)
    return [(f"ipv6:[{ip}]:{port}" if ":" in ip else f"ipv4:{ip}:{port}", authority) for ip in addresses]


class _ChannelPool:
    """Channels to single servers, made when they are first needed."""

    def __init__(self, target: str, connect: Callable[[str, Any], Any], metadata: Metadata = ()) -> None:
        self._target = target
        self._connect = connect
        self._metadata = metadata
        self._lock = threading.Lock()
        self._channels: dict[str, Any] = {}
        self._closed = False

    def _stubs(self, found: list[tuple[str, str]]) -> list[Any]:
        with self._lock:
            if self._closed:
                return []
            for target, authority in found:
                if target not in self._channels:
                    name = ("grpc.default_authority", authority)
                    self._channels[target] = self._connect(target, (*CHANNEL_OPTIONS, name))
            return [GenerationServiceStub(self._channels[target]) for target, _ in found]

    def _close(self) -> list[Any]:
        with self._lock:
            self._closed = True
            return list(self._channels.values())


class Replicas(_ChannelPool):
    """The servers behind a balanced target.

    Args:
        target: Stands for them all.
        connect: Makes a channel to a target with options.
        metadata: What every call carries.
    """

    def ask(self) -> Iterator[tuple[str, GenerationServiceStub]]:
        """Yields the tag of each server that answers, as soon as it does, and a stub for it alone."""
        answers: SimpleQueue[tuple[Any, GenerationServiceStub]] = SimpleQueue()
        stubs: list[GenerationServiceStub] = self._stubs(resolve(self._target))
        for stub in stubs:
            call: Any = stub.GetModel.future(v1.GetModelRequest(), timeout=_ANSWER_SECONDS, metadata=self._metadata)
            call.add_done_callback(lambda call, stub=stub: answers.put((call, stub)))
        for _ in stubs:
            call, stub = answers.get()
            if call.code() is grpc.StatusCode.OK:
                yield call.result().replica, stub

    def find(self, generation_id: str) -> GenerationServiceStub | None:
        """Returns a stub for the server that has begun a generation. None when it does not answer."""
        home = generation_id.rpartition(".")[0]
        return next((stub for replica, stub in self.ask() if replica == home), None)

    def close(self) -> None:
        """Closes all channels."""
        for channel in self._close():
            channel.close()


class AsyncReplicas(_ChannelPool):
    """The servers behind a balanced target, see `Replicas`."""

    async def ask(self) -> AsyncIterator[tuple[str, GenerationServiceAsyncStub]]:
        """Yields the tag of each server that answers, as soon as it does, and a stub for it alone."""
        found = await asyncio.get_running_loop().run_in_executor(None, resolve, self._target)
        asking = [asyncio.ensure_future(self._tag(stub)) for stub in self._stubs(found)]
        try:
            for answer in asyncio.as_completed(asking):
                if (told := await answer) is not None:
                    yield told
        finally:
            for task in asking:
                task.cancel()

    async def find(self, generation_id: str) -> GenerationServiceAsyncStub | None:
        """Returns a stub for the server that has begun a generation. None when it does not answer."""
        home = generation_id.rpartition(".")[0]
        async with contextlib.aclosing(self.ask()) as answers:  # type: ignore[type-var]
            async for replica, stub in answers:
                if replica == home:
                    return stub
        return None

    async def _tag(self, stub: GenerationServiceAsyncStub) -> tuple[str, GenerationServiceAsyncStub] | None:
        try:
            model = await stub.GetModel(v1.GetModelRequest(), timeout=_ANSWER_SECONDS, metadata=self._metadata)
        except grpc.RpcError:
            return None
        return model.replica, stub

    async def close(self) -> None:
        """Closes all channels."""
        for channel in self._close():
            await channel.close()
