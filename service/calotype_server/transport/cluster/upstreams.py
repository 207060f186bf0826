"""The servers behind a bridge: their health, which one has a generation, and channels to each."""

from __future__ import annotations

import asyncio
import contextlib
from enum import IntEnum
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calotype._replicas import is_balanced, resolve
from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.generations.ids import tag_of
from calotype_server.transport.grpc.options import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Options = Sequence[tuple[str, int | str]]
    Metadata = Sequence[tuple[str, Any]]
    Connect = Callable[[str, Options], grpc.aio.Channel]

__all__ = ["Health", "Upstream", "Upstreams"]

_log = structlog.get_logger(__name__)

_CALLS_PER_CHANNEL = 100
"""Many proxies allow 100 calls per connection and our servers 512; gRPC silently queues further calls."""

_ANSWER_SECONDS = 2.0
"""Time for a server to answer a health check."""

_PROBE_INTERVAL_SECONDS = 1.0

_PROBES_PER_DNS_LOOKUP = 5


class Health(IntEnum):
    """Result of a server's last health check; smaller is better."""

    SERVING = 0
    NOT_SERVING = 1
    """It is loading its model or stopping: new generations go elsewhere, its active ones continue."""
    LOST = 2
    """It did not respond."""


class Upstream:
    """One server.

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


class Upstreams:
    """All servers; an async context manager. A DNS name stands for all its current addresses.

    Args:
        targets: Addresses as returned by `calotype._channel.parse_address`.
        connect: Opens a channel to a target with options.
    """

    def __init__(self, targets: Sequence[str], connect: Connect) -> None:
        self._dns_names = [target for target in targets if is_balanced(target)]
        self._connect = connect
        self._fixed = {target: self._make(target) for target in targets if target not in self._dns_names}
        self._resolved: dict[str, Upstream] = {}
        self._rotation = count()
        self._probing: asyncio.Task[None] | None = None

    def _make(self, target: str, *extra_options: tuple[str, str]) -> Upstream:
        return Upstream(target, self._connect, (*CHANNEL_OPTIONS, *extra_options))

    async def __aenter__(self) -> Self:
        await self._resolve()
        await self.probe()
        self._refreshing = asyncio.create_task(self._refresh(), name="upstreams")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._refreshing.cancel()
        if self._probing is not None:
            self._probing.cancel()
        for upstream in self._all:
            await upstream.close()

    @property
    def _all(self) -> list[Upstream]:
        return [*self._fixed.values(), *self._resolved.values()]

    def by_health(self) -> list[Upstream]:
        """Returns all servers, best health first, then fewest active calls; equal ones take turns."""
        known = self._all
        shift = next(self._rotation) % max(1, len(known))
        return sorted(known[shift:] + known[:shift], key=lambda each: (each.health, each.active_calls))

    async def owner_of(self, generation_id: str, metadata: Metadata) -> Upstream | None:
        """Returns the server that started a generation. None if there is none, or it does not respond.

        Args:
            generation_id: Of the generation.
            metadata: Of the call that needs it; a server that requires keys only identifies itself to a valid one.
        """
        tag = tag_of(generation_id)
        if not tag:
            return None
        owner = self._with_tag(tag)
        if owner is None:
            # It may be new, or a probe may have missed it.
            await self.probe()
            await asyncio.gather(*(each.identify(metadata) for each in self._all if each.health is not Health.LOST))
            owner = self._with_tag(tag)
        return owner

    def _with_tag(self, tag: str) -> Upstream | None:
        return next((each for each in self._all if each.replica == tag and each.health is not Health.LOST), None)

    async def is_serving(self) -> bool:
        """Probes all servers and returns whether at least one accepts new generations."""
        await self.probe()
        return any(each.health is Health.SERVING for each in self._all)

    async def probe(self) -> None:
        """Checks the health of all servers. Concurrent calls share one round of checks."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe_all())
        await asyncio.shield(self._probing)

    async def _probe_all(self) -> None:
        await asyncio.gather(*(each.probe() for each in self._all))

    async def _refresh(self) -> None:
        for number in count(1):
            await asyncio.sleep(_PROBE_INTERVAL_SECONDS)
            if number % _PROBES_PER_DNS_LOOKUP == 0:
                await self._resolve()
            await self.probe()

    async def _resolve(self) -> None:
        loop = asyncio.get_running_loop()
        for name in self._dns_names:
            found = dict(await loop.run_in_executor(None, resolve, name))
            if not found:
                continue  # DNS fails more often than servers do
            for target in found.keys() - self._resolved.keys():
                self._resolved[target] = self._make(target, ("grpc.default_authority", found[target]))
            for target in self._resolved.keys() - found.keys():
                if self._resolved[target].health is Health.LOST and not self._resolved[target].active_calls:
                    await self._resolved.pop(target).close()


async def _check_health(channel: grpc.aio.Channel) -> Health:
    check: Any = health_pb2_grpc.HealthStub(channel).Check
    try:
        response = await check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
    except grpc.aio.AioRpcError as error:
        # Some ingresses have no health service.
        return Health.SERVING if error.code() is grpc.StatusCode.UNIMPLEMENTED else Health.LOST
    return Health.SERVING if response.status == health_pb2.HealthCheckResponse.SERVING else Health.NOT_SERVING
