"""One accepted job on its way to its end, and what is known of it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.engine.protocol import Stop
from calotype_server.generations.event_log import EventLog, State, advance
from calotype_server.generations.ids import new_id
from calotype_server.observability.events import (
    CancelCompleted,
    FirstPreview,
    Observe,
    PhaseSpan,
    PreviewPublished,
    PreviewsDropped,
    ignore,
)
from calotype_server.types import (
    Decoding,
    Denoising,
    EncodedImage,
    EncodingPrompt,
    Event,
    Failed,
    PreviewMethod,
    PreviewReady,
    Succeeded,
    Timings,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.generations.admission import QueueTicket
    from calotype_server.generations.estimates import StepTimeEstimator
    from calotype_server.generations.records import Record
    from calotype_server.images.encoder import Encoder
    from calotype_server.types import DeliveryOptions, Job, PreviewOptions

__all__ = ["Generation", "Stopwatch"]

_MAX_RENDITIONS = 8
"""Newest previews kept as files, one for each size and quality that readers want at the same time."""


class Generation:
    """One accepted job.

    Args:
        job: What to make.
        terms: What else the caller wants.
        number: Rises from one generation to the next.
        replica: Tag of this server, which the id of a new one begins with.
        record: What was kept of it before a restart, or None for a new one.
        image: The final image that was kept.
        observe: Told what there is to see of it.

    Attributes:
        id: Unguessable.
        number: Rises from one generation to the next.
        job: What to make.
        terms: What else the caller wants.
        created: When it was accepted, in seconds of the system's clock.
        log: Its events.
        readers: How many follow it now.
        told: Number of its newest event when that was last looked at.
        reaper: Cancels it when nobody has come back, or None.
        working: Whether a thread of the engine is at it.
        first_of_its_size: Whether no picture of its size had been finished when it was accepted.
        acceptance: Writes it to the disk, and gives the error that it met; None where nothing is written.
    """

    def __init__(
        self,
        job: Job,
        terms: DeliveryOptions,
        number: int,
        replica: str,
        record: Record | None = None,
        image: bytes | None = None,
        observe: Observe = ignore,
    ) -> None:
        self.id = new_id(replica) if record is None else record.generation_id
        self.number = number
        self.job = job
        self.terms = terms
        self.created = time.time() if record is None else record.created
        self.log = EventLog() if record is None else EventLog(_restored(record, image))
        self.stop = Stop()
        self.stop_error: errors.ServiceError | None = None
        self.ticket: QueueTicket | None = None
        self.watch = Stopwatch()
        self.readers = 0
        self.told = 0
        self.reaper: asyncio.TimerHandle | None = None
        self.observe = observe
        self.working = False
        self.first_of_its_size = False
        self._stopped_at: float | None = None
        self.acceptance: asyncio.Task[errors.ServiceError | None] | None = None
        self.previews: Counter[str] = Counter()
        """How many were drawn, by method."""
        self._renditions: OrderedDict[tuple[int, int], tuple[PreviewReady, asyncio.Future[EncodedImage]]]
        self._renditions = OrderedDict()

    @property
    def ended(self) -> bool:
        """Whether its end has been published."""
        return self.log.state.phase.is_end

    @property
    def created_ns(self) -> int:
        """`created` in nanoseconds, by which lists are cut into pages: it means the same on every server."""
        return round(self.created * 1e9)

    @property
    def size(self) -> int:
        """Bytes that are worth counting: those of its image, or before its end those of its previews."""
        end = self.log.state.end
        if end is not None:
            return len(end.image.data) if isinstance(end, Succeeded) else 0
        files = (
            file
            for _, file in self._renditions.values()
            if file.done() and not file.cancelled() and not file.exception()
        )
        return self.log.held_bytes + sum(len(file.result().data) for file in files)

    @property
    def is_void(self) -> bool:
        """Whether it comes to nothing for want of a reader, server or disk, so that the same request begins anew."""
        end = self.log.state.end
        error = self.stop_error if end is None else getattr(end, "error", None)
        return isinstance(error, errors.Abandoned | errors.Draining | errors.StateUnavailable)

    def end_early(self, error: errors.ServiceError) -> None:
        """Asks it to end with `error`: at once while queued, before the next denoising step while running."""
        if self.stop.is_set() or self.ended:
            return
        self.stop_error = error
        self._stopped_at = time.monotonic()
        self.stop.set()
        if self.ticket is not None and not self.ticket.turn.done():
            self.ticket.turn.set_exception(error)

    async def accepted(self) -> None:
        """Waits until it is on disk, where it is to be kept: nobody is told of it before.

        Raises:
            StateUnavailable: It cannot be kept, and is given up.
        """
        if self.acceptance is None:
            return
        # One reader who leaves must not cancel it for the others.
        unkept = await asyncio.shield(self.acceptance)
        if unkept is not None:
            raise unkept

    def differing(self, job: Job, terms: DeliveryOptions) -> list[str]:
        """Returns the names of what another request wants otherwise; a seed that is left to the server is the same."""
        same = dataclasses.replace(job, seed=self.job.seed) if terms.seed_was_drawn else job
        names = (field.name for field in dataclasses.fields(job))
        return [name for name in names if getattr(same, name) != getattr(self.job, name)]

    def reporter(self, pace: StepTimeEstimator, active: Callable[[], int]) -> Callable[[Event], None]:
        """Returns the engine's `report`: notes the time, adds the estimate, publishes. Runs in the engine's threads.

        Args:
            pace: Estimates, and learns from each step.
            active: Tells how many generations are at work.
        """
        job, ticket = self.job, self.ticket
        assert ticket is not None

        def report(event: Event) -> None:
            first = self.watch.note(event)
            if isinstance(event, PreviewReady):
                self.previews[event.method.value] += 1
                self.observe(PreviewPublished(event.method, job.preview.method is PreviewMethod.AUTO))
                if first:
                    self.observe(FirstPreview(self.watch.total))
            if isinstance(event, Denoising | PreviewReady) and event.skipped:
                self.observe(PreviewsDropped("undrawn", event.skipped))
            match event:
                case EncodingPrompt():
                    event = dataclasses.replace(event, estimated_remaining=pace.total_seconds(job, active()))
                case Denoising(step, total) | PreviewReady(step, total):
                    if seconds := self.watch.step_seconds(step):
                        pace.observe_step(job, seconds * total / job.step_count, active())
                    left = pace.remaining_seconds(job, step, total, active())
                    event = dataclasses.replace(event, estimated_remaining=left)
                    if left is not None and (whole := pace.total_seconds(job, active())):
                        ticket.left = min(ticket.left, left / whole)
                case Decoding():
                    left = pace.remaining_seconds(job, 1, 1, active())
                    event = dataclasses.replace(event, estimated_remaining=left)
            self.log.publish(event)

        return report

    def slot_freed(self) -> None:
        """Notes that no thread is at it any more."""
        self.working = False
        if self._stopped_at is not None:
            self.observe(CancelCompleted(time.monotonic() - self._stopped_at))

    async def rendition(self, encoder: Encoder, preview: PreviewReady, options: PreviewOptions) -> EncodedImage:
        """Returns a preview as a file. Readers who want the same get the same: it is encoded once."""
        key = (options.max_edge, options.quality)
        held = self._renditions.get(key)
        if held is None or held[0] is not preview:
            held = preview, asyncio.ensure_future(encoder.preview(preview.pixels, options))
            self._renditions[key] = held
            while len(self._renditions) > _MAX_RENDITIONS:
                self._renditions.popitem(last=False)
        # One reader who leaves must not cancel it for the others.
        return await asyncio.shield(held[1])

    def settle(self) -> None:
        """Frees what only running generations need."""
        if self.reaper is not None:
            self.reaper.cancel()
            self.reaper = None
        self._renditions.clear()


def _restored(record: Record, image: bytes | None) -> State:
    """The state in which a restart leaves a generation: its end, or its beginning."""
    if record.end is None:
        return State()
    told = record.end
    end: Succeeded | Failed
    if told.image is not None and image is not None:
        file = EncodedImage(told.image.format, told.image.width, told.image.height, image)
        end = Succeeded(file, told.timings, told.finished_early)
    else:
        end = Failed(told.error or errors.GenerationFailed("The image was lost."), told.timings)
    return advance(State(step=told.step, total_steps=told.total_steps), end)


class Stopwatch:
    """Notes when each phase was first reached, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._accepted = time.monotonic()
        self._reached: dict[type[Event], float] = {}
        self._drawn: float | None = None
        self._step: tuple[int, float] | None = None
        self.events = 0
        """Noted so far: as long as it rises, there is progress."""
        self.batch_rows = 0.0
        """As the engine told."""

    @property
    def total(self) -> float:
        """Seconds since it was accepted."""
        return time.monotonic() - self._accepted

    def note(self, event: Event) -> bool:
        """Notes that an event has happened, and returns whether it is the first of its kind."""
        self.events += 1
        if isinstance(event, Decoding):
            self.batch_rows = event.batch_rows
        first = type(event) not in self._reached
        if first:
            self._reached[type(event)] = time.monotonic()
        return first

    def note_drawn(self) -> None:
        """Notes that the pixels are there: all that is left is the file."""
        self._drawn = time.monotonic()

    def phases(self) -> tuple[PhaseSpan, ...]:
        """Returns the phases that were reached, the last of them up to now."""
        started, denoising, decoding = (self._reached.get(kind) for kind in (EncodingPrompt, Denoising, Decoding))
        begins = {
            "queue": self._accepted,
            "encode_prompt": started,
            "denoise": denoising,
            "decode": decoding,
            "encode_image": self._drawn,
        }
        known = [(name, begin) for name, begin in begins.items() if begin is not None]
        ends = [*(begin for _, begin in known[1:]), time.monotonic()]
        return tuple(PhaseSpan(name, begin, end) for (name, begin), end in zip(known, ends, strict=True))  # type: ignore[arg-type]

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
