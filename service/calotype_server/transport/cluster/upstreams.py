"""The servers behind a bridge: which are well, which has what, and a channel with room to each."""

from __future__ import annotations

import asyncio
import contextlib
from enum import IntEnum
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calotype.targets import is_balanced, resolve
from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.generations.ids import tag_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Options = Sequence[tuple[str, int | str]]
    Metadata = Sequence[tuple[str, Any]]
    Connect = Callable[[str, Options], grpc.aio.Channel]

__all__ = ["CHANNEL_OPTIONS", "Health", "Upstream", "Upstreams"]

_log = structlog.get_logger(__name__)

CHANNEL_OPTIONS: Options = (
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    # A generation may wait in the queue for long: pings notice a dead link meanwhile.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A generation that was started twice costs twice; the caller decides.
    ("grpc.enable_retries", 0),
    # A server that comes back is found again soon.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # Otherwise all channels to a server share one connection.
    ("grpc.use_local_subchannel_pool", 1),
)

_STREAMS_PER_CHANNEL = 100
"""What servers let a connection have is 100 in many proxies and 256 in ours; one more waits, and nothing tells."""

_ANSWER_SECONDS = 2.0
"""For a server to say whether it is well."""

_PROBE_SECONDS = 1.0
"""Between two rounds of asking."""

_RESOLVE_ROUNDS = 5
"""Rounds of asking between two looks at DNS."""


class Health(IntEnum):
    """What a server said when it was last asked; the smaller, the better."""

    SERVING = 0
    NOT_SERVING = 1
    """It loads its model, or is about to stop: new generations go elsewhere, what it has goes on."""
    LOST = 2
    """No answer."""


class Upstream:
    """One server.

    Args:
        target: To connect to.
        connect: Makes a channel to a target with options.
        options: Of its channels.

    Attributes:
        target: As given.
        health: When it was last asked.
        replica: Its tag; empty until it is known.
        streams: Calls under way.
    """

    def __init__(self, target: str, connect: Connect, options: Options) -> None:
        self.target = target
        self.health = Health.LOST
        self.replica = ""
        self._connect = connect
        self._options = options
        self._channels: dict[grpc.aio.Channel, int] = {}

    @property
    def streams(self) -> int:
        """Calls under way."""
        return sum(self._channels.values())

    @contextlib.contextmanager
    def channel(self) -> Iterator[grpc.aio.Channel]:
        """Lends a channel for one call."""
        free = (channel for channel, streams in self._channels.items() if streams < _STREAMS_PER_CHANNEL)
        channel = next(free, None) or self._connect(self.target, self._options)
        self._channels[channel] = self._channels.get(channel, 0) + 1
        try:
            yield channel
        finally:
            self._channels[channel] -= 1

    async def probe(self) -> None:
        """Asks how it is."""
        with self.channel() as channel:
            health = await _health(channel)
        if health is not self.health:
            _log.info("upstream", target=self.target, health=health.name)
        self.health = health

    async def identify(self, metadata: Metadata) -> None:
        """Asks who it is; it may want to know who asks."""
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
    """All servers, an async context manager. A name of DNS stands for as many as it has addresses, at any time.

    Args:
        targets: What `calotype.targets.parse_address` makes of addresses.
        connect: Makes a channel to a target with options.
    """

    def __init__(self, targets: Sequence[str], connect: Connect) -> None:
        self._names = [target for target in targets if is_balanced(target)]
        self._connect = connect
        self._fixed = {target: self._make(target) for target in targets if target not in self._names}
        self._found: dict[str, Upstream] = {}
        self._turn = count()
        self._probe: asyncio.Task[None] | None = None

    def _make(self, target: str, *more: tuple[str, str]) -> Upstream:
        return Upstream(target, self._connect, (*CHANNEL_OPTIONS, *more))

    async def __aenter__(self) -> Self:
        await self._resolve()
        await self.probe()
        self._watching = asyncio.create_task(self._watch(), name="upstreams")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watching.cancel()
        if self._probe is not None:
            self._probe.cancel()
        for upstream in self._all:
            await upstream.close()

    @property
    def _all(self) -> list[Upstream]:
        return [*self._fixed.values(), *self._found.values()]

    def by_health(self) -> list[Upstream]:
        """Returns all, those first that serve, of these the one with the fewest calls, of equals each in turn."""
        known = self._all
        shift = next(self._turn) % max(1, len(known))
        return sorted(known[shift:] + known[:shift], key=lambda each: (each.health, each.streams))

    async def home(self, generation_id: str, metadata: Metadata) -> Upstream | None:
        """Returns the server that has begun a generation. None when there is none, or it does not answer.

        Args:
            generation_id: Of the generation.
            metadata: Of the call that it is for: only who may call may ask a server who it is.
        """
        tag = tag_of(generation_id)
        if not tag:
            return None
        home = self._home(tag)
        if home is None:
            # It may have come since all were asked, or have been taken for lost too soon.
            await self.probe()
            await asyncio.gather(*(each.identify(metadata) for each in self._all if each.health is not Health.LOST))
            home = self._home(tag)
        return home

    def _home(self, tag: str) -> Upstream | None:
        return next((each for each in self._all if each.replica == tag and each.health is not Health.LOST), None)

    async def is_serving(self) -> bool:
        """Asks whether at least one of them takes new generations."""
        await self.probe()
        return any(each.health is Health.SERVING for each in self._all)

    async def probe(self) -> None:
        """Asks all how they are; who comes while they are asked waits for the same answers."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._ask())
        await asyncio.shield(self._probe)

    async def _ask(self) -> None:
        await asyncio.gather(*(each.probe() for each in self._all))

    async def _watch(self) -> None:
        for number in count(1):
            await asyncio.sleep(_PROBE_SECONDS)
            if number % _RESOLVE_ROUNDS == 0:
                await self._resolve()
            await self.probe()

    async def _resolve(self) -> None:
        loop = asyncio.get_running_loop()
        for name in self._names:
            found = dict(await loop.run_in_executor(None, resolve, name))
            if not found:
                continue  # DNS fails more often than servers do
            for target in found.keys() - self._found.keys():
                self._found[target] = self._make(target, ("grpc.default_authority", found[target]))
            for target in self._found.keys() - found.keys():
                if self._found[target].health is Health.LOST and not self._found[target].streams:
                    await self._found.pop(target).close()


async def _health(channel: grpc.aio.Channel) -> Health:
    check: Any = health_pb2_grpc.HealthStub(channel).Check
    try:
        answer = await check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
    except grpc.aio.AioRpcError as error:
        # Some ingresses have no health service.
        return Health.SERVING if error.code() is grpc.StatusCode.UNIMPLEMENTED else Health.LOST
    return Health.SERVING if answer.status == health_pb2.HealthCheckResponse.SERVING else Health.NOT_SERVING
