"""The use case: start a generation, follow it from anywhere, end it, and see every one to its end."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server import errors
from calotype_server.generations.generation import Generation
from calotype_server.generations.ids import new_tag, tag_of
from calotype_server.generations.index import GenerationIndex
from calotype_server.generations.tracked_reader import Reader
from calotype_server.images import metadata
from calotype_server.observability.events import GenerationEnded, LeftQueue, Observe, PreviewsDropped, ignore
from calotype_server.observability.redaction import redact_in_logs
from calotype_server.types import (
    DeliveryOptions,
    DisconnectPolicy,
    EncodedImage,
    Failed,
    Heartbeat,
    Job,
    Phase,
    Queued,
    Succeeded,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection

    from calotype_server.auth.access import Caller
    from calotype_server.auth.quotas import Quota
    from calotype_server.engine.protocol import Engine
    from calotype_server.generations.admission import Admission, QueueTicket
    from calotype_server.generations.estimates import StepTimeEstimator
    from calotype_server.generations.event_log import Update
    from calotype_server.generations.retention import Retention
    from calotype_server.generations.store import Store
    from calotype_server.images.encoder import Encoder
    from calotype_server.types import ModelInfo, PreviewOptions

__all__ = ["Generations"]

_log = structlog.get_logger(__name__)

_WARM_UP_STEPS = 3

_RETURN_SECONDS = 60.0
"""For callers to come back after a restart before their generations are cancelled."""


_RESTART_SECONDS = 2.0
"""From the end of this server until there is another, at least: there is no sense in asking sooner."""


class Generations:
    """All generations of one engine.

    Args:
        engine: Does the work.
        admission: Decides who works when.
        pace: Learns from every generation that succeeds.
        encoder: Makes image files.
        ended: Keeps what has ended for a while.
        store: Keeps all of it on disk, or None.
        max_active: Threads to keep, as many as admission lets run at once.
        heartbeat: Seconds between two looks at whether there is news of a generation; where there is none, it says so.
        on_dead: Called once when the engine cannot go on.
        observe: Told what there is to see, but for the warm-up.
    """

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        pace: StepTimeEstimator,
        encoder: Encoder,
        ended: Retention[Generation],
        store: Store | None = None,
        *,
        max_active: int,
        heartbeat: float = 5.0,
        on_dead: Callable[[], None],
        observe: Observe = ignore,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._pace = pace
        self._encoder = encoder
        self._registry = GenerationIndex(ended, store)
        self.replica = new_tag() if store is None else store.replica
        self._heartbeat = heartbeat
        self._beating: asyncio.TimerHandle | None = None
        self._on_dead = on_dead
        self._observe = observe
        self._threads = ThreadPoolExecutor(max_active, "calotype-generation")
        self._running: dict[Generation, asyncio.Task[None]] = {}
        self._numbers = itertools.count(1)
        self._retry_after: float | None = None
        self._drawn_sizes: set[tuple[int, int]] = set()
        self._given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when nobody shall wait for threads any more."""
        self._readers = 0
        self._unread = asyncio.Event()
        self._unread.set()

    @property
    def model(self) -> ModelInfo:
        """The engine's model."""
        return self._engine.model

    @property
    def readers(self) -> int:
        """Streams that follow a generation."""
        return self._readers

    @property
    def running(self) -> list[Generation]:
        """Those that have been accepted and have not ended."""
        return list(self._running)

    async def start(self, job: Job, terms: DeliveryOptions, quota: Quota | None = None) -> Generation:
        """Accepts a job, or returns the generation that the same request has started before.

        Follow it without waiting for anything else in between, or nobody may be left to end it.

        Args:
            job: What to make.
            terms: What else the caller wants, and who it is.
            quota: What the caller may start; only new generations count.

        Raises:
            NotReady: The server is draining.
            RequestIdTaken: The request id was used with other parameters.
            RateLimited: The quota is used up for now.
            QueueFull: No place in the queue.
            DeadlineTooShort: Hopeless from the start.
        """
        if (started := self._registry.same(job, terms)) is not None:
            return started
        if self._retry_after is not None:
            raise errors.NotReady("The server is stopping.", retry_after=self._retry_after)
        generation = Generation(job, terms, next(self._numbers), self.replica, observe=self._observe)
        if quota is not None:
            quota.check(job, self._registry.active(terms.caller))
        self._begin(generation)
        if quota is not None:
            quota.charge(job)
        self._registry.accept(generation)
        return generation

    async def restore(self) -> None:
        """Takes up what the store has kept: what has ended can be watched again, the rest is begun again.

        Whoever wanted a cancel when they leave gets some time to come back.
        """
        async for record, image in self._registry.load():
            grace = max(record.terms.grace, _RETURN_SECONDS)
            terms = replace(record.terms, deadline=None, grace=grace)
            generation = Generation(record.job, terms, next(self._numbers), self.replica, record, image, self._observe)
            if generation.ended:
                self._registry.end(generation)
                continue
            try:
                self._begin(generation)
            except errors.ServiceError as error:
                # Not for the next start either: whoever still wants it asks again, and then there would be two.
                _log.warning("not begun again", generation=generation.id, reason=error.reason)
                self._registry.drop(generation)
                continue
            self._enter(generation)
            self._leave(generation)

    def _begin(self, generation: Generation) -> None:
        def on_move(position: int, remaining: float | None) -> None:
            generation.log.publish(Queued(position, remaining))

        job, terms = generation.job, generation.terms
        generation.first_of_its_size = (job.width, job.height) not in self._drawn_sizes
        generation.ticket = self._admission.enter(job, terms.caller, on_move, terms.deadline)
        task = asyncio.create_task(self._run(generation, generation.ticket), name=f"generation-{generation.id}")
        self._running[generation] = task
        self._registry.add(generation)
        if self._beating is None:
            self._beating = asyncio.get_running_loop().call_later(self._heartbeat, self._beat)

    def _beat(self) -> None:
        """Tells readers who have heard nothing since the last time that all is well."""
        for generation in self._running:
            if generation.log.state.sequence == generation.told:
                generation.log.publish(Heartbeat(self._heartbeat))
            generation.told = generation.log.state.sequence
        loop = asyncio.get_running_loop()
        self._beating = loop.call_later(self._heartbeat, self._beat) if self._running else None

    def follow(
        self, generation: Generation, after: int = 0, preview: PreviewOptions | None = None
    ) -> Reader[tuple[Update, EncodedImage | None]]:
        """Returns a reader of updates with their preview encoded, up to the end.

        With a store, what has been told survives a restart. When the last reader leaves before the end, the
        generation's terms say what follows.

        Args:
            generation: Running or ended.
            after: Number of the last event that the reader knows.
            preview: What this reader wants of the previews that are made; None for what the generation was asked for.

        Raises:
            StateUnavailable: The generation cannot be kept, and is given up.
        """
        self._enter(generation)
        return Reader(self._updates(generation, after, preview), lambda: self._leave(generation))

    async def _updates(
        self, generation: Generation, after: int, preview: PreviewOptions | None
    ) -> AsyncGenerator[tuple[Update, EncodedImage | None], None]:
        await generation.accepted()
        unread = 0
        async for update in generation.log.follow(after, preview):
            lost = update.previews_dropped - update.state.previews_skipped - unread
            if lost:
                unread += lost
                generation.observe(PreviewsDropped("unread", lost))
            image = None
            if update.preview is not None:
                options = preview or generation.job.preview
                image = await generation.rendition(self._encoder, update.preview, options)
            yield update, image

    async def newest_preview(self, generation: Generation) -> EncodedImage | None:
        """Returns the newest preview as the generation was asked for them, or None where there is none now."""
        newest = generation.log.newest_preview
        if newest is None:
            return None
        return await generation.rendition(self._encoder, newest[1], generation.job.preview)

    def find(self, generation_id: str, caller: Caller) -> Generation:
        """Returns a generation that runs or is kept.

        Raises:
            GenerationNotFound: No such generation, or it ended long ago, or it is out of this caller's reach.
            OtherReplica: It is one of another server, which alone knows it.
        """
        found = self._registry.find(generation_id)
        if found is None and tag_of(generation_id) not in ("", self.replica):
            raise errors.OtherReplica(
                "That generation belongs to another server, or to one that is gone.",
                metadata={"replica": self.replica},
            )
        if found is None or not caller.can_access(found.terms.caller):
            raise errors.GenerationNotFound("No generation of that id is known.")
        return found

    def cancel(self, generation_id: str, caller: Caller) -> Phase:
        """Cancels a generation and returns the phase it was in; an end means there was nothing to cancel.

        Raises:
            GenerationNotFound: As `find`.
        """
        generation = self.find(generation_id, caller)
        phase = generation.log.state.phase
        generation.end_early(errors.Cancelled("The generation was cancelled."))
        return phase

    def finish(self, generation_id: str, caller: Caller) -> Phase:
        """Has a generation end with the picture as it is, and returns the phase it was in.

        Raises:
            GenerationNotFound: As `find`.
        """
        generation = self.find(generation_id, caller)
        phase = generation.log.state.phase
        generation.stop.finish()
        return phase

    def newest(self, caller: Caller, before: int | None = None) -> list[Generation]:
        """Returns the generations that a caller may list and that run or are kept, the newest first.

        Args:
            caller: Who asks.
            before: Only those accepted before, in nanoseconds of the system's clock; None for all.
        """
        return self._registry.newest(caller, before)

    async def warm_up(self) -> None:
        """Makes two quick pictures: the first caller finds warm caches, and the estimates have something to go by.

        Raises:
            ServiceError: The model cannot make a picture.
        """
        model = self.model
        job = Job(
            prompt="warm-up",
            negative_prompt=None,
            width=model.width,
            height=model.height,
            step_count=min(model.step_count, _WARM_UP_STEPS),
            guidance_scale=model.guidance_scale,
            seed=0,
            scheduler=model.scheduler,
        )
        for _ in range(2):
            # What the first one takes is not typical: everything is done for the first time.
            self._pace.forget()
            generation = Generation(job, DeliveryOptions(), next(self._numbers), self.replica)
            self._begin(generation)
            await self.idle()
            if isinstance(generation.log.state.end, Failed):
                raise generation.log.state.end.error

    def refuse(self, retry_after: float) -> None:
        """Takes no more work from now on; `retry_after` is what callers are told, in seconds."""
        self._retry_after = retry_after

    async def idle(self) -> None:
        """Returns when every accepted generation has ended, and whoever follows one has read its end."""
        await self._all_ended()
        await self._unread.wait()

    async def end_all(self) -> None:
        """Ends what is left as UNAVAILABLE, and waits for it: at most one denoising step, or one decode."""
        self._interrupt()
        await self._all_ended()
        await self._registry.settle()

    async def abandon(self, stalled: Collection[Generation]) -> None:
        """Ends everything without waiting for threads, because those of `stalled` will not end.

        The others end as when the server stops, and are begun again after it.
        """
        self.refuse(_RESTART_SECONDS)
        for generation in stalled:
            generation.end_early(errors.EngineStalled("The model has stopped answering; the server is started anew."))
        self._interrupt()
        self._given_up.set_result(None)
        await self._all_ended()
        await self._registry.settle()

    def _interrupt(self) -> None:
        for generation in self.running:
            generation.end_early(errors.Draining("The server is stopping.", retry_after=_RESTART_SECONDS))

    async def _all_ended(self) -> None:
        while self._running:
            await asyncio.wait(self._running.values())

    def close(self) -> None:
        """Frees the threads; everything must have ended."""
        if self._beating is not None:
            self._beating.cancel()
        self._threads.shutdown()

    def _enter(self, generation: Generation) -> None:
        generation.readers += 1
        if generation.reaper is not None:
            generation.reaper.cancel()
            generation.reaper = None
        self._readers += 1
        self._unread.clear()

    def _leave(self, generation: Generation) -> None:
        self._readers -= 1
        if not self._readers:
            self._unread.set()
        generation.readers -= 1
        if generation.readers or generation.ended or generation.terms.on_disconnect is DisconnectPolicy.KEEP:
            return
        left = errors.Abandoned("The caller left.")
        if not generation.terms.grace:
            generation.end_early(left)
            return
        loop = asyncio.get_running_loop()
        generation.reaper = loop.call_later(generation.terms.grace, generation.end_early, left)

    async def _run(self, generation: Generation, ticket: QueueTicket) -> None:
        structlog.contextvars.bind_contextvars(generation=generation.id)
        redact_in_logs(generation.job.prompt, generation.job.negative_prompt)
        end: Succeeded | Failed
        try:
            image = await self._make(generation, ticket)
            early = generation.log.state.finished_early
            end = Succeeded(image, generation.watch.timings(), early)
            if not early:
                self._pace.observe_end(generation.job, end.timings)
        except errors.ServiceError as error:
            cause = generation.stop_error if isinstance(error, errors.Cancelled) else None
            end = Failed(cause or error, generation.watch.timings())
        except Exception:
            _log.exception("generation failed")
            end = Failed(errors.GenerationFailed("The image could not be made."), generation.watch.timings())
        phases = generation.watch.phases()
        await self._registry.keep_end(generation, end)
        generation.log.publish(end)
        generation.settle()
        del self._running[generation]
        self._registry.end(generation)
        outcome = "succeeded" if isinstance(end, Succeeded) else end.error.reason
        seconds = round(end.timings.total or 0.0, 3)
        steps = generation.log.state.step
        generation.observe(
            GenerationEnded(generation.id, generation.job, end, phases, steps, generation.watch.batch_rows)
        )
        _log.info("generation ended", outcome=outcome, seconds=seconds, previews=dict(generation.previews))
        if isinstance(end, Failed) and isinstance(end.error, errors.EngineDead):
            self._on_dead()

    async def _make(self, generation: Generation, ticket: QueueTicket) -> EncodedImage:
        try:
            await ticket.turn
            generation.observe(LeftQueue(generation.watch.total))
            call = contextvars.copy_context().run
            report = generation.reporter(self._pace, lambda: self._admission.active)
            work = asyncio.get_running_loop().run_in_executor(
                self._threads, call, self._engine.run, generation.job, report, generation.stop
            )
            generation.working = True
            # The slot is free when the thread has ended, not before.
            either: tuple[asyncio.Future[Any], ...] = work, self._given_up
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                assert generation.stop_error is not None
                raise generation.stop_error
            pixels = work.result()
            generation.watch.note_drawn()
            self._drawn_sizes.add((generation.job.width, generation.job.height))
        finally:
            self._admission.leave(ticket)
            if generation.working:
                generation.slot_freed()
        self._check(generation)
        state = generation.log.state
        parameters = metadata.describe(generation.job, self.model, state.step if state.finished_early else None)
        image = await self._encoder.final(pixels, generation.job.output, parameters)
        self._check(generation)
        return image

    @staticmethod
    def _check(generation: Generation) -> None:
        """Sees to a cancel that came while the picture was decoded or encoded, which cannot be interrupted."""
        if isinstance(generation.stop_error, errors.Cancelled):
            raise generation.stop_error
