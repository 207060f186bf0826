"""All servers behind a bridge: their health, and which one has a generation."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING, Self

from calotype.targets import is_balanced, resolve
from calotype_server import threads
from calotype_server.generations.ids import tag_of
from calotype_server.transport.cluster.upstream import Health, Upstream
from calotype_server.transport.grpc.options import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.transport.cluster.upstream import Connect, Metadata

__all__ = ["Upstreams"]

_PROBE_INTERVAL_SECONDS = 1.0

_PROBES_PER_DNS_LOOKUP = 5


class Upstreams:
    """All servers; an async context manager. A DNS name stands for all its current addresses.

    Args:
        targets: Addresses as returned by `calotype.targets.parse_address`.
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
        for name in self._dns_names:
            found = dict(await threads.run("resolve", resolve, name))
            if not found:
                continue  # DNS fails more often than servers do
            for target in found.keys() - self._resolved.keys():
                self._resolved[target] = self._make(target, ("grpc.default_authority", found[target]))
            for target in self._resolved.keys() - found.keys():
                if self._resolved[target].health is Health.LOST and not self._resolved[target].active_calls:
                    await self._resolved.pop(target).close()
