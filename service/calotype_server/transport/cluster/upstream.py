"""One server behind a bridge, or another replica: its health, its tag, and channels to it."""

from __future__ import annotations

import contextlib
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Options = Sequence[tuple[str, int | str]]
    Metadata = Sequence[tuple[str, Any]]
    Connect = Callable[[str, Options], grpc.aio.Channel]

__all__ = ["Health", "Upstream"]

_log = structlog.get_logger(__name__)

_CALLS_PER_CHANNEL = 100
"""Many proxies allow 100 calls per connection and our servers 512; gRPC silently queues further calls."""

_ANSWER_SECONDS = 2.0
"""Time for a server to answer a health check."""


class Health(IntEnum):
    """Result of a server's last health check; smaller is better."""

    SERVING = 0
    NOT_SERVING = 1
    """It is loading its model or stopping: new generations go elsewhere, its active ones continue."""
    LOST = 2
    """It did not respond."""


class Upstream:
    """One server behind a bridge, or another replica.

    Args:
        target: Address to connect to.
        connect: Opens a channel to a target with options.
        options: Of its channels.

    Attributes:
        target: As given.
        health: Result of the last health check.
        replica: Its tag, see `generations.ids`; "" until it is known.
    """

    def __init__(self, target: str, connect: Connect, options: Options) -> None:
        self.target = target
        self.health = Health.LOST
        self.replica = ""
        self._connect = connect
        self._options = options
        self._channels: dict[grpc.aio.Channel, int] = {}

    @property
    def active_calls(self) -> int:
        """Number of calls that use its channels now."""
        return sum(self._channels.values())

    @contextlib.contextmanager
    def channel(self) -> Iterator[grpc.aio.Channel]:
        """Yields a channel with capacity for one more call; opens one if all are full."""
        free = (channel for channel, calls in self._channels.items() if calls < _CALLS_PER_CHANNEL)
        channel = next(free, None) or self._connect(self.target, self._options)
        self._channels[channel] = self._channels.get(channel, 0) + 1
        try:
            yield channel
        finally:
            self._channels[channel] -= 1

    async def probe(self) -> None:
        """Updates `health`."""
        with self.channel() as channel:
            health = await _check_health(channel)
        if health is not self.health:
            _log.info("upstream", target=self.target, health=health.name)
        self.health = health

    async def identify(self, metadata: Metadata) -> None:
        """Updates `replica`. Sends a caller's metadata, since the server may require a key."""
        with self.channel() as channel:
            stub: Any = GenerationServiceStub(channel)
            try:
                model = await stub.GetModel(pb.GetModelRequest(), metadata=metadata, timeout=_ANSWER_SECONDS)
            except grpc.aio.AioRpcError:
                return
        self.replica = model.replica

    async def close(self) -> None:
        """Closes its channels."""
        for channel in self._channels:
            await channel.close()


async def _check_health(channel: grpc.aio.Channel) -> Health:
    check: Any = health_pb2_grpc.HealthStub(channel).Check
    try:
        response = await check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
    except grpc.aio.AioRpcError as error:
        # Some ingresses have no health service.
        return Health.SERVING if error.code() is grpc.StatusCode.UNIMPLEMENTED else Health.LOST
    return Health.SERVING if response.status == health_pb2.HealthCheckResponse.SERVING else Health.NOT_SERVING
