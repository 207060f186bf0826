"""All generations of one engine: start, follow, cancel, finish, restore, and end them all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import structlog

from calotype_server import errors
from calotype_server.generations.generation import Generation
from calotype_server.generations.ids import tag_of
from calotype_server.generations.reader import Reader
from calotype_server.generations.restored import reason_not_to_run
from calotype_server.observability.events import GenerationEnded, Observe, ignore
from calotype_server.observability.redaction import redact_in_logs
from calotype_server.types import Failed, Job, Phase, Queued, Succeeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator

    from calotype_server.auth.access import Caller
    from calotype_server.auth.quotas import Quota
    from calotype_server.generations.admission import Admission, QueueTicket
    from calotype_server.generations.index import GenerationIndex
    from calotype_server.generations.records import Record
    from calotype_server.generations.retention import Retention
    from calotype_server.generations.runner import Runner
    from calotype_server.limits import Limits
    from calotype_server.observability.events import PhaseSpan
    from calotype_server.types import DeliveryOptions, EncodedImage, ModelInfo, PreviewOptions

__all__ = ["Generations"]

_log = structlog.get_logger(__name__)

_RESTORED_GRACE_SECONDS = 60.0
"""Least time for callers to reconnect after a restart before their generations are aborted."""

_STATE_RETRY_SECONDS = 5.0

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
        model: The engine's model.
        replica: Tag of this server, which begins the id of each of its generations.
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
        self.model: ModelInfo = runner.model
        self.replica: str = index.replica
        self._runner = runner
        self._admission = admission
        self._index = index
        self._heartbeat_seconds = heartbeat_seconds
        self._heartbeat: asyncio.TimerHandle | None = None
        self._on_dead = on_dead
        self._observe = observe
        self._running: set[Generation] = set()
        self._numbers = itertools.count(1)
        self._retry_after: float | None = None
        self._readers = 0
        self._all_read = asyncio.Event()
        self._all_read.set()

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
            NotReady: The server is draining.
            RequestIdTaken: The request id was used with other parameters.
            RateLimited: The quota is exhausted for now.
            QueueFull: The queue has no free place.
            DeadlineTooShort: The image cannot be ready before the deadline.
            StateUnavailable: The generation could not be written to disk, or the disk has no room for its image.
        """
        generation = self._index.same(job, delivery) or self._accept(job, delivery, quota)
        with self._read(generation) as reader:
            await generation.persisted()
            yield reader

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

    def cancel(self, generation_id: str, caller: Caller) -> Phase:
        """Cancels a generation and returns the phase it was in. One that has ended does not change.

        Raises:
            GenerationNotFound: As for `find`.
        """
        generation = self.find(generation_id, caller)
        phase = generation.events.state.phase
        generation.abort(errors.Cancelled("The generation was cancelled."))
        return phase

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
        async for record, image in self._index.load():
            grace = max(record.delivery.grace, _RESTORED_GRACE_SECONDS)
            delivery = replace(record.delivery, deadline=None, grace=grace)
            generation = self._create(record.job, delivery, record=record, image=image)
            if generation.ended:
                self._index.end(generation)
            elif error := reason_not_to_run(record, self.model, limits):
                rejected.append((generation, error))
            else:
                try:
                    self._run(generation, restored=True)
                except errors.ServiceError as error:
                    rejected.append((generation, error))
                else:
                    generation.expect_reader()
        await asyncio.gather(*(self._reject_restored(generation, error) for generation, error in rejected))

    def reject_new(self, retry_after: float) -> None:
        """Rejects new generations from now on; rejected callers may retry after `retry_after` seconds."""
        self._retry_after = retry_after

    async def idle(self) -> None:
        """Returns when every generation has ended and every reader has been closed."""
        await self._all_ended()
        await self._all_read.wait()

    async def abort_all(self) -> None:
        """Ends all generations with `Draining` and waits: at most one denoising step, or one decode."""
        for generation in self.running:
            generation.abort(errors.Draining("The server is stopping.", retry_after=_RESTART_SECONDS))
        await self._all_ended()
        await self._index.settle()

    async def abort_stalled(self, stalled: Collection[Generation]) -> None:
        """Ends all generations without waiting for threads, because those of `stalled` hang.

        The stalled ones fail with `EngineStalled`. The others end as when the server stops, and run again after it
        restarts.
        """
        self.reject_new(_RESTART_SECONDS)
        for generation in stalled:
            generation.abort(errors.EngineStalled("The model stopped responding; the server restarts."))
        self._runner.detach_threads()
        await self.abort_all()

    def close(self) -> None:
        """Stops the heartbeats. All generations must have ended."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()

    def _accept(self, job: Job, delivery: DeliveryOptions, quota: Quota | None) -> Generation:
        if self._retry_after is not None:
            raise errors.NotReady("The server is stopping.", retry_after=self._retry_after)
        if quota is not None:
            quota.check(job, self._index.active(delivery.caller))
        if problem := self._index.problem:
            raise errors.StateUnavailable(problem, retry_after=_STATE_RETRY_SECONDS)
        generation = self._create(job, delivery)
        ticket = self._run(generation)
        if quota is not None:
            quota.charge(job)
        self._index.accept(generation, starts=ticket.turn.done())
        return generation

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

    def _run(self, generation: Generation, *, restored: bool = False) -> QueueTicket:
        """Puts a generation in the queue and runs it in its own task. Returns its place in the queue."""

        def on_move(position: int, remaining: float | None) -> None:
            generation.events.publish(Queued(position, remaining))

        delivery = generation.delivery
        ticket = self._admission.enter(
            generation.job,
            delivery.caller,
            on_move,
            delivery.deadline,
            restored=restored,
            suspect=generation.attempts > 0,
        )
        generation.begin(self._run_to_end(generation, ticket))
        self._running.add(generation)
        self._index.add(generation)
        if self._heartbeat is None:
            self._heartbeat = asyncio.get_running_loop().call_later(self._heartbeat_seconds, self._beat)
        return ticket

    async def _run_to_end(self, generation: Generation, ticket: QueueTicket) -> None:
        structlog.contextvars.bind_contextvars(generation=generation.id)
        redact_in_logs(generation.job.prompt, generation.job.negative_prompt)
        end = await self._runner.run(generation, ticket, partial(self._index.persist_attempt, generation))
        await self._conclude(generation, end)
        if isinstance(end, Failed) and isinstance(end.error, errors.EngineDead):
            self._on_dead()

    async def _conclude(self, generation: Generation, end: Succeeded | Failed) -> None:
        """Stores and publishes an end."""
        phases = generation.stopwatch.phases()
        # On disk before any reader sees it, so that readers can rely on it.
        end = await self._index.persist_end(generation, end)
        generation.end(end)
        self._running.discard(generation)
        self._index.end(generation)
        self._report_end(generation, end, phases)

    async def _reject_restored(self, generation: Generation, error: errors.ServiceError) -> None:
        """Ends a stored generation that may not run again."""
        structlog.contextvars.bind_contextvars(generation=generation.id)
        redact_in_logs(generation.job.prompt, generation.job.negative_prompt)
        _log.error(
            "a stored generation does not run again",
            generation=generation.id,
            reason=error.reason,
            attempts=generation.attempts,
        )
        await self._conclude(generation, Failed(error, generation.stopwatch.timings()))

    @staticmethod
    def _report_end(generation: Generation, end: Succeeded | Failed, phases: tuple[PhaseSpan, ...]) -> None:
        steps, rows = generation.events.state.step, generation.stopwatch.batch_rows
        generation.observe(GenerationEnded(generation.id, generation.job, end, phases, steps, rows))
        outcome = "succeeded" if isinstance(end, Succeeded) else end.error.reason
        seconds = round(end.timings.total or 0.0, 3)
        _log.info("generation ended", outcome=outcome, seconds=seconds, previews=dict(generation.previews))

    def _beat(self) -> None:
        for generation in self._running:
            generation.heartbeat(self._heartbeat_seconds)
        loop = asyncio.get_running_loop()
        self._heartbeat = loop.call_later(self._heartbeat_seconds, self._beat) if self._running else None

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
