"""The use case: start a generation, follow it, cancel it, and see every one to its end."""

from __future__ import annotations

import asyncio
import contextvars
import secrets
import time
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from calotype_server import errors, metadata
from calotype_server.engine.protocol import Stop
from calotype_server.stream import EventLog, Update
from calotype_server.types import (
    Decoding,
    Denoising,
    EncodedImage,
    EncodingPrompt,
    Event,
    Failed,
    Job,
    Phase,
    PreviewReady,
    Queued,
    Succeeded,
    Timings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from calotype_server.admission import Admission, Ticket
    from calotype_server.encode import Encoder
    from calotype_server.engine.protocol import Engine
    from calotype_server.estimates import Pace
    from calotype_server.types import ModelInfo

__all__ = ["Generation", "Generations"]

_log = structlog.get_logger(__name__)

_REMEMBERED_ENDS = 1024
"""Ends kept so that cancelling twice, or too late, is answered truthfully."""

_WARM_UP_STEPS = 3


class Generation:
    """One accepted job on its way to its end."""

    def __init__(self, job: Job) -> None:
        self.id = secrets.token_urlsafe(16)
        self.job = job
        self.log = EventLog()
        self.stop = Stop()
        self.stop_error: errors.GenerationError | None = None
        self.ticket: Ticket | None = None
        self.watch = _Stopwatch()
        self.previews: Counter[str] = Counter()
        """How many were drawn, by method."""

    def end_early(self, error: errors.GenerationError) -> None:
        """Asks it to end with `error`: at once while queued, before the next denoising step while running."""
        if self.stop.is_set() or self.log.state.phase.is_end:
            return
        self.stop_error = error
        self.stop.set()
        if self.ticket is not None and not self.ticket.turn.done():
            self.ticket.turn.set_exception(error)


class Generations:
    """All generations of one engine.

    Args:
        engine: Does the work.
        admission: Decides who works when.
        pace: Learns from every generation that succeeds.
        encoder: Makes image files.
        max_active: Threads to keep, as many as admission lets run at once.
        on_dead: Called once when the engine cannot go on.
    """

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        pace: Pace,
        encoder: Encoder,
        *,
        max_active: int,
        on_dead: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._pace = pace
        self._encoder = encoder
        self._on_dead = on_dead
        self._threads = ThreadPoolExecutor(max_active, "calotype-generation")
        self._running: dict[str, tuple[Generation, asyncio.Task[None]]] = {}
        self._ended: OrderedDict[str, Phase] = OrderedDict()
        self._retry_after: float | None = None
        self._followers = 0
        self._followed = asyncio.Event()
        self._followed.set()

    @property
    def model(self) -> ModelInfo:
        """The engine's model."""
        return self._engine.model

    def start(self, job: Job, caller: str = "", deadline: float | None = None) -> Generation:
        """Accepts a job; its events can be followed from now on.

        Args:
            job: The work.
            caller: Whose it is; callers share the server evenly.
            deadline: Seconds that the caller waits at most; None for ever.

        Raises:
            NotReady: The server is draining.
            QueueFull: No place in the queue.
            DeadlineTooShort: Hopeless from the start.
        """
        if self._retry_after is not None:
            raise errors.NotReady("The server is stopping.", retry_after=self._retry_after)
        generation = Generation(job)

        def on_move(position: int, remaining: float | None) -> None:
            generation.log.publish(Queued(position, remaining))

        generation.ticket = self._admission.enter(job, caller, on_move, deadline)
        task = asyncio.create_task(self._run(generation, generation.ticket), name=f"generation-{generation.id}")
        self._running[generation.id] = generation, task
        return generation

    async def follow(self, generation: Generation) -> AsyncGenerator[tuple[Update, EncodedImage | None], None]:
        """Yields updates with their preview encoded, up to the end. Leaving before the end cancels the generation."""
        self._followers += 1
        self._followed.clear()
        try:
            preview = generation.job.preview
            async for update in generation.log.follow():
                image = None if update.preview is None else await self._encoder.preview(update.preview.pixels, preview)
                yield update, image
        finally:
            generation.end_early(errors.Cancelled("The caller left."))
            self._followers -= 1
            if not self._followers:
                self._followed.set()

    def cancel(self, generation_id: str) -> Phase:
        """Cancels a generation and returns the phase it was in; an end means there was nothing to cancel.

        Raises:
            GenerationNotFound: No such generation, or it ended long ago.
        """
        if generation_id in self._running:
            generation, _ = self._running[generation_id]
            phase = generation.log.state.phase
            generation.end_early(errors.Cancelled("The generation was cancelled."))
            return phase
        try:
            return self._ended[generation_id]
        except KeyError:
            raise errors.GenerationNotFound("No generation of that id is known.") from None

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
            generation = self.start(job)
            await self.idle()
            if isinstance(generation.log.state.end, Failed):
                raise generation.log.state.end.error

    def refuse(self, retry_after: float) -> None:
        """Takes no more work from now on; `retry_after` is what callers are told, in seconds."""
        self._retry_after = retry_after

    async def idle(self) -> None:
        """Returns when every accepted generation has ended, and whoever follows one has read its end."""
        await self._all_ended()
        await self._followed.wait()

    async def end_all(self) -> None:
        """Ends what is left as UNAVAILABLE, and waits for it: at most one denoising step, or one decode."""
        for generation, _ in list(self._running.values()):
            generation.end_early(errors.Interrupted("The server is stopping.", retry_after=self._retry_after))
        await self._all_ended()

    async def _all_ended(self) -> None:
        while self._running:
            await asyncio.wait([task for _, task in self._running.values()])

    def close(self) -> None:
        """Frees the threads; everything must have ended."""
        self._threads.shutdown()

    async def _run(self, generation: Generation, ticket: Ticket) -> None:
        structlog.contextvars.bind_contextvars(generation=generation.id)
        end: Succeeded | Failed
        try:
            image = await self._make(generation, ticket)
            end = Succeeded(image, generation.watch.timings())
            self._pace.observe_end(generation.job, end.timings)
        except errors.ServiceError as error:
            cause = generation.stop_error if isinstance(error, errors.Cancelled) else None
            end = Failed(cause or error, generation.watch.timings())
        except Exception:
            _log.exception("generation failed")
            end = Failed(errors.GenerationFailed("The image could not be made."), generation.watch.timings())
        generation.log.publish(end)
        self._remember(generation)
        outcome = "succeeded" if isinstance(end, Succeeded) else end.error.reason
        seconds = round(end.timings.total or 0.0, 3)
        _log.info("generation ended", outcome=outcome, seconds=seconds, previews=dict(generation.previews))
        if isinstance(end, Failed) and isinstance(end.error, errors.EngineDead):
            self._on_dead()

    async def _make(self, generation: Generation, ticket: Ticket) -> EncodedImage:
        try:
            await ticket.turn
            call = contextvars.copy_context().run
            work = asyncio.get_running_loop().run_in_executor(
                self._threads,
                call,
                self._engine.run,
                generation.job,
                self._reporter(generation, ticket),
                generation.stop,
            )
            # The slot is free when the thread has ended, not before.
            pixels = await asyncio.shield(work)
        finally:
            self._admission.leave(ticket)
        if isinstance(generation.stop_error, errors.Cancelled):
            # It came while the picture was being decoded, which cannot be interrupted.
            raise generation.stop_error
        return await self._encoder.final(pixels, generation.job.output, metadata.describe(generation.job, self.model))

    def _reporter(self, generation: Generation, ticket: Ticket) -> Callable[[Event], None]:
        """Returns the engine's `report`: notes the time, adds the estimate, publishes. Runs in the engine's threads."""
        job, pace, watch = generation.job, self._pace, generation.watch

        def report(event: Event) -> None:
            watch.note(event)
            if isinstance(event, PreviewReady):
                generation.previews[event.method.value] += 1
            active = self._admission.active
            match event:
                case EncodingPrompt():
                    event = replace(event, estimated_remaining=pace.total_seconds(job, active))
                case Denoising(step, total) | PreviewReady(step, total):
                    if seconds := watch.step_seconds(step):
                        pace.observe_step(job, seconds * total / job.step_count, active)
                    left = pace.remaining_seconds(job, step, total, active)
                    event = replace(event, estimated_remaining=left)
                    if left is not None and (whole := pace.total_seconds(job, active)):
                        ticket.left = min(ticket.left, left / whole)
                case Decoding():
                    event = replace(event, estimated_remaining=pace.remaining_seconds(job, 1, 1, active))
            generation.log.publish(event)

        return report

    def _remember(self, generation: Generation) -> None:
        self._ended[generation.id] = generation.log.state.phase
        del self._running[generation.id]
        while len(self._ended) > _REMEMBERED_ENDS:
            self._ended.popitem(last=False)


class _Stopwatch:
    """Notes when each phase was first reached, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._accepted = time.monotonic()
        self._reached: dict[type[Event], float] = {}
        self._step: tuple[int, float] | None = None

    def note(self, event: Event) -> None:
        self._reached.setdefault(type(event), time.monotonic())

    def step_seconds(self, step: int) -> float | None:
        """Returns the seconds of a step since this was last asked; None the first time and when there was none."""
        before, now = self._step, time.monotonic()
        if before is not None and step <= before[0]:
            return None
        self._step = step, now
        return None if before is None else (now - before[1]) / (step - before[0])

    def timings(self) -> Timings:
        """Returns the durations as of now."""
        now = time.monotonic()
        started, denoising, decoding, preview = (
            self._reached.get(kind) for kind in (EncodingPrompt, Denoising, Decoding, PreviewReady)
        )
        return Timings(
            queued=_span(self._accepted, started or now),
            encoding_prompt=_span(started, denoising or now),
            denoising=_span(denoising, decoding or now),
            decoding=_span(decoding, now),
            first_preview=_span(self._accepted, preview),
            total=now - self._accepted,
        )


def _span(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin
