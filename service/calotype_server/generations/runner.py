"""Takes a generation through queue, engine and image encoder, and turns every outcome into a typed end."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server import errors, threads
from calotype_server.failpoints import hit
from calotype_server.generations.estimates import Turns
from calotype_server.generations.generation import Generation
from calotype_server.images import metadata
from calotype_server.images.scaling import scaling_notices
from calotype_server.observability.events import LeftQueue
from calotype_server.types import (
    Decoding,
    DeliveryOptions,
    Denoising,
    EncodingPrompt,
    Event,
    Failed,
    Job,
    PreviewReady,
    Succeeded,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from calotype_server.engine.protocol import Engine
    from calotype_server.generations.admission import Admission, QueueTicket
    from calotype_server.generations.estimates import StepTimeEstimator
    from calotype_server.images.encoder import Encoder
    from calotype_server.types import EncodedImage, ModelInfo, Pixels

__all__ = ["Runner"]

_log = structlog.get_logger(__name__)

_WARM_UP_IMAGES = 2
_WARM_UP_STEPS = 3


class Runner:
    """Runs generations on one engine, each in its own thread.

    Args:
        engine: Generates the images.
        admission: The queue in front of the engine.
        estimator: Learns from every step and every generation that succeeds.
        encoder: Makes the image files.

    Attributes:
        encoder: Makes the image files.
    """

    def __init__(self, engine: Engine, admission: Admission, estimator: StepTimeEstimator, encoder: Encoder) -> None:
        self.encoder = encoder
        self._engine = engine
        self._admission = admission
        self._estimator = estimator
        self._threads = ThreadPoolExecutor(engine.model.max_active, "calotype-generation")
        self._drawn_sizes: set[tuple[int, int]] = set()
        self._warming_up: Generation | None = None
        self._turns = Turns(engine.model.max_progressing)
        self._detached: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def model(self) -> ModelInfo:
        """The engine's model."""
        return self._engine.model

    @property
    def warming_up(self) -> list[Generation]:
        """The generation of the warm-up that runs now; no caller sees it."""
        return [] if self._warming_up is None else [self._warming_up]

    def has_drawn(self, job: Job) -> bool:
        """Whether an image of the job's size was finished before."""
        return (job.width, job.height) in self._drawn_sizes

    async def warm_up(self) -> None:
        """Generates two quick images, so that the first caller finds warm caches and the estimates have a basis.

        Raises:
            ServiceError: The model cannot generate an image.
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
        for number in range(_WARM_UP_IMAGES):
            # The first image does many things for the first time, so its duration is not typical.
            self._estimator.forget()
            generation = Generation(job, DeliveryOptions(), number, "warm-up", first_of_its_size=True)
            self._warming_up = generation
            try:
                end = await self.run(generation, self._admission.enter(job, "", lambda *_: None))
            finally:
                # If the warm-up is cancelled, its thread ends before the next step.
                generation.stop.set()
                self._warming_up = None
            if isinstance(end, Failed):
                raise end.error

    async def run(
        self, generation: Generation, ticket: QueueTicket, before_start: Callable[[], Awaitable[None]] | None = None
    ) -> Succeeded | Failed:
        """Waits for the turn, generates the image and encodes it. Returns the end; does not publish it.

        It raises only if its task is cancelled.

        Args:
            generation: The generation to run.
            ticket: Its place in the queue, which is given back in any case.
            before_start: Awaited when the turn has come, before the engine gets the job; a `ServiceError` from it is
                the end.
        """
        try:
            image = await self._make(generation, ticket, before_start)
        except errors.ServiceError as error:
            return Failed(_decisive(generation, error), generation.stopwatch.timings())
        except asyncio.CancelledError:
            raise
        except BaseException:
            _log.exception("generation failed")
            failure = errors.GenerationFailed("The image could not be generated.")
            return Failed(_decisive(generation, failure), generation.stopwatch.timings())
        early = generation.events.state.finished_early
        end = Succeeded(image, generation.stopwatch.timings(), early)
        if not early:
            try:
                self._estimator.observe_end(generation.job, end.timings)
            except Exception:
                _log.exception("the estimates cannot learn from a generation")
        return end

    def detach_threads(self) -> None:
        """Stops waiting for the threads of engine and encoder: aborted generations end now, even if a thread hangs."""
        if not self._detached.done():
            self._detached.set_result(None)

    def close(self) -> None:
        """Joins the threads. All generations must have ended."""
        self._threads.shutdown()

    async def _make(
        self, generation: Generation, ticket: QueueTicket, before_start: Callable[[], Awaitable[None]] | None
    ) -> EncodedImage:
        try:
            await generation.unless_aborted(ticket.turn)
            if before_start is not None:
                preparing = asyncio.ensure_future(before_start())
                await self._unless_detached(generation, preparing)
                preparing.result()
            hit("runner.start")
            generation.observe(LeftQueue(generation.stopwatch.total))
            with generation.running_on_engine():
                pixels = await self._draw(generation, ticket)
            generation.stopwatch.note_drawn()
            self._drawn_sizes.add((generation.job.width, generation.job.height))
        finally:
            # The slot is free when the engine's thread has ended, not before.
            self._admission.leave(ticket)
        _check_cancelled(generation)
        state = generation.events.state
        parameters = metadata.describe(generation.job, self.model, state.step if state.finished_early else None)
        encoding = asyncio.ensure_future(self.encoder.final(pixels, generation.job.output, parameters))
        await self._unless_detached(generation, encoding)
        _check_cancelled(generation)
        return encoding.result()

    async def _draw(self, generation: Generation, ticket: QueueTicket) -> Pixels:
        """Runs the engine in a thread, in the context of this task so that its log lines carry the same ids."""
        report = self._reporter(generation, ticket)

        def run() -> Pixels:
            hit("engine.run")
            return self._engine.run(generation.job, report, generation.stop)

        work = threads.submit(self._threads, run)
        await self._unless_detached(generation, threads.done(work))
        return work.result()

    async def _unless_detached(self, generation: Generation, work: asyncio.Future[Any]) -> None:
        """Waits for a thread's work.

        Raises:
            ServiceError: The threads were detached first; the error of the abort.
        """
        either: tuple[asyncio.Future[Any], ...] = work, self._detached
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return
        # Its result does not matter any more.
        work.add_done_callback(lambda _: work.cancelled() or work.exception())
        raise generation.abort_error or errors.Draining("The server is stopping.")

    def _reporter(self, generation: Generation, ticket: QueueTicket) -> Callable[[Event], None]:
        """Returns the engine's `report`: learns from an event, adds the estimated time left, and publishes it.

        The engine calls it from its threads.
        """
        turn = self._turns.join()

        def report(event: Event) -> None:
            hit("engine.report")
            job, active = generation.job, self._admission.progressing
            match event:
                case EncodingPrompt(notices):
                    left = self._estimator.total_seconds(job, active)
                    event = replace(
                        event,
                        notices=(*notices, *scaling_notices(job)),
                        estimated_remaining=self._admission.seconds_left(ticket, left),
                    )
                case Denoising(step, total) | PreviewReady(step, total):
                    # Forecast steps take no time, and their time counts for the next step that is computed.
                    done, all_computed = job.computed_steps(step, total), job.computed_steps(total, total)
                    if seconds := generation.stopwatch.step_seconds(done):
                        seconds /= turn.note_step()
                        self._estimator.observe_step(job, seconds * all_computed / job.computed_step_count, active)
                    elif step == 0:
                        turn.begin()
                    left = self._estimator.remaining_seconds(job, done, all_computed, active)
                    if left is not None and (whole := self._estimator.total_seconds(job, active)):
                        ticket.note_left(left / whole)
                    event = replace(event, estimated_remaining=self._admission.seconds_left(ticket, left))
                case Decoding():
                    left = self._estimator.remaining_seconds(job, 1, 1, active)
                    event = replace(event, estimated_remaining=left)
            generation.publish(event)

        return report


def _decisive(generation: Generation, error: errors.ServiceError) -> errors.ServiceError:
    """Returns the error of the end: that of an abort, even if the generation fails while it is aborted.

    By then, the same request may have started a new generation, because this one had no reader.
    """
    cause = generation.abort_error
    if cause is None or isinstance(error, errors.EngineDead):
        return error
    return cause if isinstance(cause, errors.Cancelled) or isinstance(error, errors.Cancelled) else error


def _check_cancelled(generation: Generation) -> None:
    """Raises the error of a cancel that arrived during decoding or encoding, which cannot be interrupted."""
    if isinstance(generation.abort_error, errors.Cancelled):
        raise generation.abort_error
