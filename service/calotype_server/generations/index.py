"""Which generations there are: those that run, and those that have ended, for a while; on disk too, if wanted."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

from calotype_server import errors
from calotype_server.generations.records import Record
from calotype_server.types import Failed, Succeeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from calotype_server.auth.access import Caller
    from calotype_server.generations.generation import Generation
    from calotype_server.generations.retention import Retention
    from calotype_server.generations.store import Store
    from calotype_server.types import DeliveryOptions, Job

__all__ = ["GenerationIndex"]

_log = structlog.get_logger(__name__)


class GenerationIndex:
    """Finds generations by their id, by their request's, and by their caller. Lives in the event loop.

    Args:
        ended: Keeps what has ended for a while.
        store: Keeps all of it on disk, or None.
    """

    def __init__(self, ended: Retention[Generation], store: Store | None = None) -> None:
        self._ended = ended
        ended.on_forget = self._forget
        ended.reserved = lambda: sum(generation.size for generation in self._running.values())
        self._store = store
        self._running: dict[str, Generation] = {}
        self._requests: dict[tuple[str, str], Generation] = {}
        """By caller and request id; of those that run or are kept."""
        self._expiry: asyncio.TimerHandle | None = None
        self._chores: set[asyncio.Task[None]] = set()

    def add(self, generation: Generation) -> None:
        """Notes one that runs from now on."""
        self._running[generation.id] = generation
        self._name(generation)

    def end(self, generation: Generation) -> None:
        """Notes that one has ended; it is kept within the bounds of the retention, and no longer."""
        self._running.pop(generation.id, None)
        self._name(generation)
        self._ended.add(generation.id, generation, generation.size)
        self._expire()

    def find(self, generation_id: str) -> Generation | None:
        """Returns one that runs or is kept, or None."""
        return self._running.get(generation_id) or self._ended.get(generation_id)

    def same(self, job: Job, terms: DeliveryOptions) -> Generation | None:
        """Returns what the same request has started before, or None.

        Raises:
            RequestIdTaken: The request id was used with other parameters.
        """
        self._ended.expire()
        earlier = self._requests.get((terms.caller, terms.request_id)) if terms.request_id else None
        if earlier is None or earlier.is_void:
            return None
        if differing := earlier.differing(job, terms):
            raise errors.RequestIdTaken(
                f"The request id was used before, with another {', '.join(differing)}.",
                metadata={"generation_id": earlier.id},
            )
        return earlier

    def active(self, owner: str) -> int:
        """Returns how many of a caller's generations wait or run."""
        return sum(each.terms.caller == owner for each in self._running.values())

    def newest(self, caller: Caller, before: int | None = None) -> list[Generation]:
        """Returns the generations that a caller may list and that run or are kept, the newest first.

        Args:
            caller: Who asks.
            before: Only those accepted before, in nanoseconds of the system's clock; None for all.
        """
        known = [*self._running.values(), *self._ended]
        own = (each for each in known if caller.can_list(each.terms.caller))
        earlier = (each for each in own if before is None or each.created_ns < before)
        return sorted(earlier, key=lambda each: (-each.created_ns, -each.number))

    def accept(self, generation: Generation) -> None:
        """Begins to keep a new one on disk, which `Generation.accepted` waits for."""
        if self._store is not None:
            generation.acceptance = asyncio.create_task(self._accept(self._store, generation))

    async def keep_end(self, generation: Generation, end: Succeeded | Failed) -> None:
        """On disk before anybody is told: who has read the end can rely on it."""
        if self._store is None or (isinstance(end, Failed) and isinstance(end.error, errors.Draining)):
            # What the server's own stop interrupts is begun again after the restart.
            return
        state = generation.log.state
        early = isinstance(end, Succeeded) and end.finished_early
        step = state.total_steps if isinstance(end, Succeeded) and not early else state.step
        try:
            await self._store.end(generation.id, end, step=step, total_steps=state.total_steps)
        except errors.ServiceError:
            _log.exception("the end of a generation is not kept")

    async def load(self) -> AsyncIterator[tuple[Record, bytes | None]]:
        """Yields what the disk has kept, the oldest first, each with its final image if there is one."""
        if self._store is None:
            return
        for record in await self._store.load():
            image = None
            if record.end is not None:
                # Said in the log; one picture that cannot be read is no reason not to start.
                with contextlib.suppress(errors.StateUnavailable):
                    image = await self._store.image(record.generation_id)
            yield record, image

    def drop(self, generation: Generation) -> None:
        """Takes one off the disk without waiting for it: what fails now is done after the next start."""
        if self._store is not None:
            self._later(self._store.forget([generation.id]))

    async def settle(self) -> None:
        """Waits for what is still being written, and forgets nothing more by itself."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        while self._chores:
            await asyncio.wait(self._chores)

    async def _accept(self, store: Store, generation: Generation) -> errors.ServiceError | None:
        record = Record(generation.id, generation.job, generation.terms, generation.created)
        try:
            await store.accept(record)
        except errors.ServiceError as error:
            generation.end_early(error)
            return error
        return None

    def _name(self, generation: Generation) -> None:
        """Lets its request id lead to a generation, unless it leads to a newer one that replaced it."""
        key = generation.terms.caller, generation.terms.request_id
        held = self._requests.get(key)
        if generation.terms.request_id and (held is None or held.number < generation.number):
            self._requests[key] = generation

    def _expire(self) -> None:
        """Forgets in time also while nobody asks for anything."""
        if self._expiry is not None:
            self._expiry.cancel()
        left = self._ended.expire()
        self._expiry = None if left is None else asyncio.get_running_loop().call_later(left, self._expire)

    def _forget(self, generation: Generation) -> None:
        """Lets the request id of a generation that is no longer kept be used again."""
        key = generation.terms.caller, generation.terms.request_id
        if self._requests.get(key) is generation:
            del self._requests[key]
        self.drop(generation)

    def _later(self, work: Coroutine[object, object, None]) -> None:
        async def carefully() -> None:
            with contextlib.suppress(errors.ServiceError):
                await work

        task = asyncio.create_task(carefully())
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
