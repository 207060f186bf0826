"""Finds generations: the running ones, and the ended ones that are retained in memory or stored on disk."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog

from calotype_server import errors
from calotype_server.generations.ids import new_tag
from calotype_server.generations.records import Record
from calotype_server.generations.retention import Retention
from calotype_server.generations.state.thread import unavailable
from calotype_server.generations.state_writer import StateWriter
from calotype_server.types import Failed, Succeeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from calotype_server.auth.access import Caller
    from calotype_server.generations.generation import Generation
    from calotype_server.generations.retention import RetentionLimits
    from calotype_server.generations.store import Store
    from calotype_server.types import DeliveryOptions, Job

__all__ = ["GenerationIndex", "StoredGeneration"]

_log = structlog.get_logger(__name__)


class StoredGeneration(NamedTuple):
    """A generation as it was stored.

    Attributes:
        record: The generation.
        image: Its final image, if there is one.
        replaced: Whether the same request started another generation later.
    """

    record: Record
    image: bytes | None
    replaced: bool


class GenerationIndex:
    """Finds generations by id, by request id and by caller. Lives in the event loop.

    Args:
        limits: Bounds for ended generations.
        store: Keeps all generations on disk, or None.

    Attributes:
        replica: Tag of this server: the store's, or a new one.
        retained: The ended generations.
    """

    def __init__(self, limits: RetentionLimits, store: Store | None = None) -> None:
        self.replica = new_tag() if store is None else store.replica
        self.retained: Retention[Generation] = Retention(limits, on_drop=self._forget, reserved=self._running_bytes)
        self._store = store
        self._running: dict[str, Generation] = {}
        self._requests: dict[tuple[str, str], Generation] = {}
        """Running and retained generations by caller and request id."""
        self._expiry: asyncio.TimerHandle | None = None
        self._writer = StateWriter()
        self._attempts: dict[str, int] = {}
        """The stored number of attempts of each generation that this process gave to the engine."""

    def add(self, generation: Generation) -> None:
        """Adds a generation that runs."""
        self._running[generation.id] = generation
        self._add_request(generation)

    def end(self, generation: Generation) -> None:
        """Retains a generation that has ended, within the limits."""
        self._running.pop(generation.id, None)
        self._add_request(generation)
        self.retained.add(generation.id, generation, generation.size)
        self._expire()

    def find(self, generation_id: str) -> Generation | None:
        """Returns a generation that runs or is retained, or None."""
        return self._running.get(generation_id) or self.retained.get(generation_id)

    def same(self, job: Job, delivery: DeliveryOptions) -> Generation | None:
        """Returns the generation that an earlier identical request started, or None.

        Raises:
            RequestIdTaken: The request id was used with other parameters.
        """
        self.retained.expire()
        earlier = self._requests.get((delivery.caller, delivery.request_id)) if delivery.request_id else None
        if earlier is None or earlier.is_replaceable:
            return None
        if differences := earlier.differences(job, delivery):
            raise errors.RequestIdTaken(
                f"The request id was already used with a different {', '.join(differences)}.",
                metadata={"generation_id": earlier.id},
            )
        return earlier

    def active(self, caller: str) -> int:
        """Returns the number of a caller's generations that wait or run."""
        return sum(each.delivery.caller == caller for each in self._running.values())

    def newest(self, caller: Caller, before: int | None = None) -> list[Generation]:
        """Returns the generations that a caller may list, newest first.

        Args:
            caller: The caller that lists.
            before: Only generations accepted before this time, in Unix nanoseconds; None for all.
        """
        known = [*self._running.values(), *self.retained]
        own = (each for each in known if caller.can_list(each.delivery.caller))
        earlier = (each for each in own if before is None or each.created_ns < before)
        return sorted(earlier, key=lambda each: (-each.created_ns, -each.number))

    @property
    def is_durable(self) -> bool:
        """Whether generations are stored on disk."""
        return self._store is not None

    @property
    def problem(self) -> str | None:
        """Why no new generation can be stored, in one sentence for operators; None without a problem or a store."""
        return None if self._store is None else self._store.problem

    def is_damaged(self, generation_id: str) -> bool:
        """Whether the generation is stored but cannot be read."""
        return self._store is not None and generation_id in self._store.damaged

    def accept(self, generation: Generation, *, starts: bool) -> None:
        """Starts to write a new generation to disk, if there is a store. `Generation.persisted` waits for it.

        Args:
            generation: The generation.
            starts: Whether it has a slot already: then its first attempt is written together with it.
        """
        if self._store is None:
            return
        if starts:
            self._attempts[generation.id] = 1
        attempts = self._attempts.get(generation.id, 0)
        record = Record(generation.id, generation.job, generation.delivery, generation.created, attempts)
        generation.persist(self._accept(self._store, record))

    async def persist_attempt(self, generation: Generation) -> None:
        """Writes to disk that the engine starts to work on a generation, if there is a store.

        If the process ends before the generation does, the next one knows that this generation may be the cause.

        Raises:
            StateUnavailable: It could not be written; the engine must not start.
        """
        await generation.persisted()
        if self._store is None or generation.id in self._attempts:
            return
        attempts = generation.attempts + 1
        if not await self._write_attempts(self._store, generation.id, attempts):
            raise unavailable()
        self._attempts[generation.id] = attempts

    async def persist_end(self, generation: Generation, end: Succeeded | Failed) -> Succeeded | Failed:
        """Writes an end to disk, if there is a store. Returns it, marked as not persisted if that failed.

        A failed write is repeated in the background while the server runs.
        """
        if self._store is None:
            return end
        attempted = self._attempts.pop(generation.id, None)
        if _runs_again(end):
            # The attempt does not count.
            if attempted is not None:
                await self._write_attempts(self._store, generation.id, generation.attempts)
            return replace(end, persisted=True)
        state, write = generation.events.state, self._store.end
        early = isinstance(end, Succeeded) and end.finished_early
        step = state.total_steps if isinstance(end, Succeeded) and not early else state.step
        is_durable = await self._writer.try_for_a_while(
            "end",
            lambda: write(generation.id, end, step=step, total_steps=state.total_steps, notices=state.notices),
        )
        if not is_durable:
            _log.error("the end of a generation is delivered although it could not be stored", generation=generation.id)
        return replace(end, persisted=is_durable)

    async def load(self) -> AsyncIterator[StoredGeneration]:
        """Yields the stored generations, oldest first.

        Raises:
            StateUnusable: The file cannot be read.
        """
        if self._store is None:
            return
        records = await self._store.load()
        newest = {_request_of(record): record.generation_id for record in records}
        for record in records:
            image = None
            if record.end is not None:
                try:
                    image = await self._store.image(record.generation_id)
                except errors.ServiceError as error:
                    # One unreadable image must not prevent the start.
                    _log.error("a stored image cannot be read", generation=record.generation_id, reason=error.reason)
            replaced = bool(record.delivery.request_id) and newest[_request_of(record)] != record.generation_id
            yield StoredGeneration(record, image, replaced)

    async def settle(self) -> None:
        """Waits for pending writes, and stops expiring generations."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        await self._writer.settle()

    async def _write_attempts(self, store: Store, generation_id: str, attempts: int) -> bool:
        return await self._writer.try_for_a_while("attempt", lambda: store.note_attempts(generation_id, attempts))

    async def _accept(self, store: Store, record: Record) -> None:
        try:
            await store.accept(record)
        except errors.StateUnavailable:
            self._attempts.pop(record.generation_id, None)
            # A write that hangs may still succeed, and the next start would run a generation that was rejected.
            self._writer.start("removal", partial(self._forget_when_responsive, store, record.generation_id))
            raise

    @staticmethod
    async def _forget_when_responsive(store: Store, generation_id: str) -> None:
        await store.responsive()
        await store.forget([generation_id])

    def _running_bytes(self) -> int:
        return sum(generation.size for generation in self._running.values())

    def _add_request(self, generation: Generation) -> None:
        """Makes the request id find this generation, unless it finds a newer one that replaced it."""
        key = generation.delivery.caller, generation.delivery.request_id
        held = self._requests.get(key)
        if generation.delivery.request_id and (held is None or held.number < generation.number):
            self._requests[key] = generation

    def _expire(self) -> None:
        """Drops expired generations, and sets a timer for the next one, so that memory is freed without any request."""
        if self._expiry is not None:
            self._expiry.cancel()
        left = self.retained.expire()
        self._expiry = None if left is None else asyncio.get_running_loop().call_later(left, self._expire)

    def _forget(self, generation: Generation) -> None:
        """Frees the request id of a generation that is no longer retained, and removes it from disk."""
        key = generation.delivery.caller, generation.delivery.request_id
        if self._requests.get(key) is generation:
            del self._requests[key]
        if self._store is not None and not _runs_again(generation.events.state.end):
            forget = self._store.forget
            self._writer.start("removal", lambda: forget([generation.id]))


def _request_of(record: Record) -> tuple[str, str]:
    return record.delivery.caller, record.delivery.request_id


def _runs_again(end: Succeeded | Failed | None) -> bool:
    """Whether the server's own stop aborted the generation, so that the next process runs it."""
    return isinstance(end, Failed) and isinstance(end.error, errors.Draining)
