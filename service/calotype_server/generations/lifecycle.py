"""All generations of one engine: start, follow, cancel, finish, restore, and end them all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from calotype_server import errors
from calotype_server.generations.completion import Completion
from calotype_server.generations.generation import Generation
from calotype_server.generations.groups.groups import Groups
from calotype_server.generations.heartbeats import Heartbeats
from calotype_server.generations.ids import tag_of
from calotype_server.generations.reader import Reader
from calotype_server.generations.reservation import position_reporter, reserve
from calotype_server.generations.restored import reason_not_to_run
from calotype_server.generations.state.thread import RETRY_SECONDS
from calotype_server.observability.events import Observe, ignore
from calotype_server.threads import stacks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence

    from calotype_server.auth.access import Caller
    from calotype_server.auth.quotas import Quota
    from calotype_server.generations.admission import Admission, QueueTicket
    from calotype_server.generations.index import GenerationIndex
    from calotype_server.generations.records import Record
    from calotype_server.generations.retention import Retention
    from calotype_server.generations.runner import Runner
    from calotype_server.limits import Limits
    from calotype_server.types import DeliveryOptions, EncodedImage, Job, ModelInfo, Phase, PreviewOptions

__all__ = ["Generations"]

_log = structlog.get_logger(__name__)

_RESTORED_GRACE_SECONDS = 60.0
"""Least time for callers to reconnect after a restart before their generations are aborted."""

_ABORT_SECONDS = 8.0
"""Longest time to wait for threads after an abort."""

_DISK_SECONDS = 3.0
"""Longest time to wait for the disk when the server stops."""

_RESTART_SECONDS = 2.0
"""Least time from the end of this process until its successor serves: callers should not retry earlier."""


class Generations:
    """The collection of all generations. Lives in the event loop.

    Args:
        runner: Runs the generations.
        admission: The queue in front of the engine.
        index: Finds generations, retains ended ones, and stores all of them if there is a store.
        heartbeat_seconds: Interval after which a generation without an event publishes a heartbeat.
        on_dead: Called when the engine cannot continue.
        observe: Receives events for metrics and traces.

    Attributes:
        replica: Tag of this server, which begins the id of each of its generations.
        groups: Cancels several generations at once.
    """

    def __init__(
        self,
        runner: Runner,
        admission: Admission,
        index: GenerationIndex,
        *,
        heartbeat_seconds: float = 5.0,
        on_dead: Callable[[], None],
        observe: Observe = ignore,
    ) -> None:
        self.replica: str = index.replica
        self.groups = Groups(index)
        self._runner = runner
        self._admission = admission
        self._index = index
        self._observe = observe
        self._running: set[Generation] = set()
        self._heartbeats = Heartbeats(self._running, heartbeat_seconds)
        self._completion = Completion(runner, admission, index, on_ended=self._running.discard, on_dead=on_dead)
        self._numbers = itertools.count(1)
        self._retry_after: float | None = None
        self._readers = 0
        self._all_read = asyncio.Event()
        self._all_read.set()

    @property
    def model(self) -> ModelInfo:
        """The engine's model."""
        return self._runner.model

    @property
    def readers(self) -> int:
        """Number of open readers of all generations."""
        return self._readers

    @property
    def retained(self) -> Retention[Generation]:
        """The ended generations."""
        return self._index.retained

    @property
    def running(self) -> list[Generation]:
        """Generations that were accepted and have not ended, in order of acceptance."""
        return sorted(self._running, key=lambda each: each.number)

    @contextlib.asynccontextmanager
    async def start(self, job: Job, delivery: DeliveryOptions, quota: Quota | None = None) -> AsyncIterator[Reader]:
        """Accepts a job and opens a reader; an identical request id opens a reader of the earlier generation.

        Leaving the block closes the reader. With a store, the generation is on disk before the block is entered.

        Args:
            job: The image to generate.
            delivery: How the caller wants it delivered, and who the caller is.
            quota: Limits of the caller; only new generations count.

        Raises:
            Draining: The server is draining.
            RequestIdTaken: The request id was used with other parameters.
            RateLimited: The quota is exhausted for now.
            QueueFull: The queue has no free place.
            DeadlineTooShort: The image cannot be ready before the deadline.
            StateUnavailable: The generation could not be written to disk, or the disk has no room for its image.
        """
        async with self.start_all([(job, delivery)], quota) as (reader,):
            yield reader

    @contextlib.asynccontextmanager
    async def start_all(
        self, requests: Sequence[tuple[Job, DeliveryOptions]], quota: Quota | None = None
    ) -> AsyncIterator[list[Reader]]:
        """Accepts several jobs of one caller, or none of them, and opens a reader of each; see `start`.

        A rejection uses up nothing: no slot, no place in the queue, and no part of the quota.

        Args:
            requests: Jobs and their delivery, with the same caller and deadline, and without a common request id.
            quota: Limits of the caller; only new generations count.

        Raises:
            InvalidRequest: Together the jobs exceed a limit even when nothing else waits or runs.
            ServiceError: As for `start`.
        """
        earlier = [self._index.same(job, delivery) for job, delivery in requests]
        new = [request for request, found in zip(requests, earlier, strict=True) if found is None]
        accepted = self._accept(new, quota) if new else []
        rest = iter(accepted)
        with contextlib.ExitStack() as stack:
            generations = [found or next(rest) for found in earlier]
            readers = [stack.enter_context(self._read(generation)) for generation in generations]
            try:
                for generation in generations:
                    await generation.persisted()
            except errors.ServiceError as error:
                for generation in accepted:
                    generation.abort(error)
                if quota is not None:
                    quota.refund([generation.job for generation in accepted])
                raise
            yield readers

    @contextlib.asynccontextmanager
    async def follow(
        self, generation: Generation, after: int = 0, preview: PreviewOptions | None = None
    ) -> AsyncIterator[Reader]:
        """Opens a reader of a generation that runs or is retained. Leaving the block closes it.

        Args:
            generation: As returned by `find`.
            after: Sequence number of the last event that the reader knows.
            preview: Which previews the reader wants; None for those of the request.

        Raises:
            StateUnavailable: The generation could not be written to disk.
        """
        with self._read(generation, after, preview) as reader:
            await generation.persisted()
            yield reader

    def find(self, generation_id: str, caller: Caller) -> Generation:
        """Returns a generation that runs or is retained.

        Raises:
            GenerationNotFound: There is no such generation, it is no longer retained, or the caller may not see it.
            OtherReplica: The id belongs to another server.
            DataLoss: The generation is stored but cannot be read.
        """
        found = self._index.find(generation_id)
        if found is None and self._index.is_damaged(generation_id):
            raise errors.DataLoss("The stored generation is damaged.")
        if found is None and tag_of(generation_id) not in ("", self.replica):
            raise errors.OtherReplica(
                "The generation belongs to another server, or to one that no longer runs.",
                metadata={"replica": self.replica},
            )
        if found is None or not caller.can_access(found.delivery.caller):
            raise errors.GenerationNotFound("There is no generation with this id.")
        return found

    def cancel(self, generation_id: str, caller: Caller) -> tuple[Phase, bool]:
        """Cancels a generation. Returns its phase before, and whether this call cancels it: not after its end.

        Raises:
            GenerationNotFound: As for `find`.
        """
        generation = self.find(generation_id, caller)
        phase = generation.events.state.phase
        return phase, generation.abort(errors.Cancelled("The generation was cancelled."))

    def finish(self, generation_id: str, caller: Caller) -> Phase:
        """Makes a generation end successfully with its current prediction, and returns the phase it was in.

        Raises:
            GenerationNotFound: As for `find`.
        """
        generation = self.find(generation_id, caller)
        phase = generation.events.state.phase
        generation.stop.finish()
        return phase

    async def newest_preview(self, generation: Generation) -> EncodedImage | None:
        """Returns the newest preview, encoded as the request asked; None when there is none."""
        newest = generation.events.newest_preview
        if newest is None:
            return None
        return await generation.encoded_preview(self._runner.encoder, newest[1], generation.job.preview)

    def newest(self, caller: Caller, before: int | None = None) -> list[Generation]:
        """Returns the generations that a caller may list, newest first.

        Args:
            caller: The caller that lists.
            before: Only generations accepted before this time, in Unix nanoseconds; None for all.
        """
        return self._index.newest(caller, before)

    async def restore(self, limits: Limits) -> None:
        """Loads the stored generations: ended ones can be watched again, the others run again.

        None is lost, no matter what has changed: one that may not run again ends with an error. Callers that want a
        cancel on disconnect get time to reconnect first.

        Args:
            limits: The limits of requests, which may be lower than when the generations were accepted.

        Raises:
            StateUnusable: The file cannot be read.
        """
        rejected: list[tuple[Generation, errors.ServiceError]] = []
        async for stored in self._index.load():
            record = stored.record
            grace = max(record.delivery.grace, _RESTORED_GRACE_SECONDS)
            delivery = replace(record.delivery, deadline=None, grace=grace)
            generation = self._create(record.job, delivery, record=record, image=stored.image)
            if generation.ended:
                self._index.end(generation)
            elif error := reason_not_to_run(stored, self.model, limits):
                rejected.append((generation, error))
            else:
                self._run_again(generation)
                generation.expect_reader()
        await asyncio.gather(*(self._completion.reject(generation, error) for generation, error in rejected))

    def reject_new(self, retry_after: float) -> None:
        """Rejects new generations from now on; rejected callers may retry after `retry_after` seconds."""
        self._retry_after = retry_after

    async def idle(self) -> None:
        """Returns when every generation has ended and every reader has been closed."""
        await self._all_ended()
        await self._all_read.wait()

    async def abort_all(self, patience: float | None = None) -> bool:
        """Ends all generations with `Draining`, usually within one denoising step or one decode.

        Threads and a disk that do not respond are left behind, so that every generation ends in bounded time.

        Args:
            patience: Longest time to wait for the threads of engine and encoder, in seconds; None for 8 seconds.

        Returns:
            Whether nothing was left behind.
        """
        for generation in self.running:
            generation.abort(errors.Draining("The server is stopping.", retry_after=_RESTART_SECONDS))
        orderly = await _within(_ABORT_SECONDS if patience is None else patience, self._all_ended())
        if not orderly:
            _log.error("threads do not respond and are left behind", stacks=stacks())
            self._runner.detach_threads()
            if not await _within(_DISK_SECONDS, self._all_ended()):
                _log.error("ends of generations are not stored, because the disk does not respond")
                self._completion.give_up_storing()
                await self._all_ended()
        if not await _within(_DISK_SECONDS, self._index.settle()):
            _log.error("changes are not stored, because the disk does not respond")
            return False
        return orderly

    async def abort_stalled(self, stalled: Collection[Generation]) -> None:
        """Ends all generations without waiting for threads, because those of `stalled` hang.

        The stalled ones fail with `EngineStalled`. The others end as when the server stops, and run again after it
        restarts.
        """
        self.reject_new(_RESTART_SECONDS)
        for generation in stalled:
            generation.abort(errors.EngineStalled("The model stopped responding; the server restarts."))
        self._runner.detach_threads()
        await self.abort_all(_DISK_SECONDS)

    def close(self) -> None:
        """Stops the heartbeats. All generations must have ended."""
        self._heartbeats.close()

    def _accept(self, requests: Sequence[tuple[Job, DeliveryOptions]], quota: Quota | None) -> list[Generation]:
        """Accepts all jobs or none, without giving control to the event loop in between."""
        self.groups.require_open(delivery for _, delivery in requests)
        if self._retry_after is not None:
            raise errors.Draining("The server is stopping.", retry_after=self._retry_after)
        if problem := self._index.problem:
            raise errors.StateUnavailable(problem, retry_after=RETRY_SECONDS)
        generations = [self._create(job, delivery) for job, delivery in requests]
        active = self._index.active(generations[0].delivery.caller)
        tickets = reserve(self._admission, generations, quota, active)
        for generation, ticket in zip(generations, tickets, strict=True):
            self._begin(generation, ticket)
            self._index.accept(generation, starts=ticket.turn.done())
        return generations

    def _create(
        self, job: Job, delivery: DeliveryOptions, record: Record | None = None, image: bytes | None = None
    ) -> Generation:
        return Generation(
            job,
            delivery,
            next(self._numbers),
            self.replica,
            record=record,
            image=image,
            first_of_its_size=not self._runner.has_drawn(job),
            observe=self._observe,
        )

    def _run_again(self, generation: Generation) -> None:
        """Puts a restored generation in the queue."""
        delivery = generation.delivery
        ticket = self._admission.enter(
            generation.job,
            delivery.caller,
            position_reporter(generation),
            restored=True,
            suspect=generation.attempts > 0,
        )
        self._begin(generation, ticket)

    def _begin(self, generation: Generation, ticket: QueueTicket) -> None:
        """Runs a generation that has a place in the queue."""
        generation.begin(self._completion.run(generation, ticket))
        self._running.add(generation)
        self._index.add(generation)
        self._heartbeats.start()

    @contextlib.contextmanager
    def _read(self, generation: Generation, after: int = 0, preview: PreviewOptions | None = None) -> Iterator[Reader]:
        self._readers += 1
        self._all_read.clear()
        try:
            with generation.read(after, preview) as subscription:
                yield Reader(generation, subscription, self._runner.encoder, preview)
        finally:
            self._readers -= 1
            if not self._readers:
                self._all_read.set()

    async def _all_ended(self) -> None:
        while self._running:
            await asyncio.gather(*(each.finished() for each in self._running))


async def _within(seconds: float, work: Coroutine[object, object, None]) -> bool:
    """Awaits `work`; returns whether it was done within `seconds`."""
    try:
        await asyncio.wait_for(work, seconds)
    except TimeoutError:
        return False
    return True
