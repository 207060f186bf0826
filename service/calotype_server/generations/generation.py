"""One accepted generation: its events, its readers, its disconnect timer and its abort signal."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

import structlog

from calotype_server import errors
from calotype_server.engine.protocol import Stop
from calotype_server.generations.event_log import EventLog, State, advance
from calotype_server.generations.ids import new_id
from calotype_server.generations.state.thread import unavailable
from calotype_server.generations.stopwatch import Stopwatch
from calotype_server.observability.events import (
    CancelCompleted,
    FirstPreview,
    Observe,
    PreviewPublished,
    PreviewsDropped,
    ignore,
)
from calotype_server.types import (
    Denoising,
    DisconnectPolicy,
    EncodedImage,
    Event,
    Failed,
    Heartbeat,
    PreviewMethod,
    PreviewReady,
    Succeeded,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from calotype_server.generations.event_log import Subscription
    from calotype_server.generations.records import Record
    from calotype_server.images.encoder import Encoder
    from calotype_server.types import DeliveryOptions, Job, PreviewOptions

__all__ = ["Generation"]

_log = structlog.get_logger(__name__)

_MAX_RENDITIONS = 8
"""Encoded previews kept: the newest one for each size and quality that current readers ask for."""


class Generation:
    """One accepted job. Lives in the event loop; only `publish` may be called from other threads.

    Args:
        job: The image to generate.
        delivery: How the caller wants it delivered, and who the caller is.
        number: Rises with every generation of this process.
        replica: Tag of this server; the id of a new generation begins with it.
        record: The stored record of a generation that is restored after a restart; None for a new one.
        image: The stored final image, if there is one.
        first_of_its_size: Whether this server has not finished an image of this size before.
        observe: Receives events about the generation for metrics and traces.

    Attributes:
        id: Unguessable.
        number: Rises with every generation of this process.
        job: The image to generate.
        delivery: How the caller wants it delivered, and who the caller is.
        created: Time of acceptance, in Unix seconds.
        attempts: How often an earlier process gave it to the engine without reaching an end.
        events: The event log.
        stopwatch: Durations of the phases.
        stop: Signals the engine to stop or to finish early.
        first_of_its_size: Whether this server had not finished an image of this size before.
        observe: Receives events about the generation for metrics and traces.
        previews: Number of previews published, by method.
    """

    def __init__(
        self,
        job: Job,
        delivery: DeliveryOptions,
        number: int,
        replica: str,
        *,
        record: Record | None = None,
        image: bytes | None = None,
        first_of_its_size: bool = False,
        observe: Observe = ignore,
    ) -> None:
        self.id = new_id(replica) if record is None else record.generation_id
        self.number = number
        self.job = job
        self.delivery = delivery
        self.created = time.time() if record is None else record.created
        self.attempts = 0 if record is None else record.attempts
        self.events = EventLog() if record is None else EventLog(_restored(record, image))
        self.stopwatch = Stopwatch()
        self.stop = Stop()
        self.first_of_its_size = first_of_its_size
        self.observe = observe
        self.previews: Counter[str] = Counter()
        self._readers = 0
        self._disconnect_timer: asyncio.TimerHandle | None = None
        self._last_heartbeat_sequence = 0
        self._on_engine = False
        self._aborted: asyncio.Future[errors.ServiceError] = asyncio.get_running_loop().create_future()
        self._aborted_at = 0.0
        self._decided = False
        self._persisting: asyncio.Task[errors.ServiceError | None] | None = None
        self._run: asyncio.Task[None] | None = None
        self._renditions: OrderedDict[tuple[int, int], tuple[PreviewReady, asyncio.Future[EncodedImage]]]
        self._renditions = OrderedDict()

    @property
    def ended(self) -> bool:
        """Whether the end has been published."""
        return self.events.state.phase.is_end

    @property
    def readers(self) -> int:
        """Number of callers that follow it."""
        return self._readers

    @property
    def on_engine(self) -> bool:
        """Whether an engine thread is working on it."""
        return self._on_engine

    @property
    def abort_error(self) -> errors.ServiceError | None:
        """The error it was aborted with, or None."""
        return self._aborted.result() if self._aborted.done() else None

    @property
    def created_ns(self) -> int:
        """`created` in nanoseconds. Lists are paged by it, because it means the same on every server."""
        return round(self.created * 1e9)

    @property
    def size(self) -> int:
        """Memory in bytes that counts against the limits: the final image, or the previews while it runs."""
        end = self.events.state.end
        if end is not None:
            return len(end.image.data) if isinstance(end, Succeeded) else 0
        files = (
            file
            for _, file in self._renditions.values()
            if file.done() and not file.cancelled() and not file.exception()
        )
        return self.events.held_bytes + sum(len(file.result().data) for file in files)

    @property
    def is_replaceable(self) -> bool:
        """Whether it fails for lack of a reader, server or disk; the same request then starts a new one."""
        end = self.events.state.end
        error = self.abort_error if end is None else getattr(end, "error", None)
        return isinstance(error, errors.Abandoned | errors.Draining | errors.StateUnavailable)

    def differences(self, job: Job, delivery: DeliveryOptions) -> list[str]:
        """Returns the names of the fields in which another request differs, except a seed drawn by the server."""
        same = dataclasses.replace(job, seed=self.job.seed) if delivery.seed_was_drawn else job
        names = (field.name for field in dataclasses.fields(job))
        differing = [name for name in names if getattr(same, name) != getattr(self.job, name)]
        # A generation is a member of one group, and its caller must be able to cancel that group.
        return differing if delivery.group == self.delivery.group else [*differing, "group"]

    # Running

    def begin(self, run: Coroutine[object, object, None]) -> None:
        """Runs the generation in its own task."""
        self._run = asyncio.create_task(run, name=f"generation-{self.id}")

    async def finished(self) -> None:
        """Waits until the run has ended."""
        if self._run is not None:
            await asyncio.wait({self._run})

    def abort(self, error: errors.ServiceError) -> bool:
        """Ends it with `error`: at once while queued, before the next denoising step while running.

        The first call counts. Later calls, and calls when the end is decided, do nothing and return False.
        """
        if self._aborted.done() or self._decided or self.ended:
            return False
        self._aborted_at = time.monotonic()
        self._aborted.set_result(error)
        self.stop.set()
        return True

    def decide_end(self) -> None:
        """Records that its end is decided, although it is not stored and published yet: aborts come too late now."""
        self._decided = True

    async def unless_aborted(self, turn: asyncio.Future[None]) -> None:
        """Waits for `turn`.

        Raises:
            ServiceError: The generation was aborted first.
        """
        await asyncio.wait((turn, self._aborted), return_when=asyncio.FIRST_COMPLETED)
        if self._aborted.done():
            raise self._aborted.result()

    @contextlib.contextmanager
    def running_on_engine(self) -> Iterator[None]:
        """Marks the time in which an engine thread works on it."""
        self._on_engine = True
        try:
            yield
        finally:
            self._on_engine = False
            if self._aborted.done():
                self.observe(CancelCompleted(time.monotonic() - self._aborted_at))

    def publish(self, event: Event) -> None:
        """Records an event of the engine and publishes it to all readers. Thread-safe; does not block."""
        first = self.stopwatch.note(event)
        if isinstance(event, PreviewReady):
            self.previews[event.method.value] += 1
            self.observe(PreviewPublished(event.method, self.job.preview.method is PreviewMethod.AUTO))
            if first:
                self.observe(FirstPreview(self.stopwatch.total))
        if isinstance(event, Denoising | PreviewReady) and event.skipped:
            self.observe(PreviewsDropped("undrawn", event.skipped))
        self.events.publish(event)

    def heartbeat(self, interval: float) -> None:
        """Publishes `Heartbeat` if nothing else was published in the last `interval` seconds."""
        if self.events.state.sequence == self._last_heartbeat_sequence:
            self.events.publish(Heartbeat(interval))
        self._last_heartbeat_sequence = self.events.state.sequence

    def end(self, end: Succeeded | Failed) -> None:
        """Publishes the end and frees everything that only a running generation needs."""
        self.events.publish(end)
        self._cancel_disconnect_timer()
        self._renditions.clear()

    # Persistence

    def persist(self, write: Coroutine[object, object, None]) -> None:
        """Starts to write the generation to disk; it is aborted if that fails. `persisted` waits for it."""

        async def persist() -> errors.ServiceError | None:
            try:
                await write
            except errors.ServiceError as error:
                self.abort(error)
                return error
            except Exception:
                _log.exception("a generation could not be stored")
                failure = unavailable()
                self.abort(failure)
                return failure
            return None

        self._persisting = asyncio.create_task(persist())

    async def persisted(self) -> None:
        """Waits until the generation is on disk. No caller sees it before that. Returns at once without a store.

        Raises:
            StateUnavailable: It could not be written, and is aborted.
        """
        if self._persisting is None:
            return
        # Shielded: a reader that leaves must not cancel the write for the others.
        error = await asyncio.shield(self._persisting)
        if error is not None:
            raise error

    # Reading

    @contextlib.contextmanager
    def read(self, after: int = 0, preview: PreviewOptions | None = None) -> Iterator[Subscription]:
        """Subscribes a reader for the duration of the block.

        When the last reader leaves before the end, `DeliveryOptions.on_disconnect` decides: the generation is kept, or
        aborted after the grace period.

        Args:
            after: Sequence number of the last event that the reader knows.
            preview: Which previews the reader wants; None for all.
        """
        self._readers += 1
        self._cancel_disconnect_timer()
        try:
            with self.events.subscribe(after, preview) as subscription:
                yield subscription
        finally:
            self._readers -= 1
            if not self._readers:
                self.expect_reader()

    def expect_reader(self) -> None:
        """Aborts the generation after its grace period unless a reader comes, if its caller wants that."""
        if self.ended or self.delivery.on_disconnect is DisconnectPolicy.KEEP:
            return
        error = errors.Abandoned("The caller disconnected.")
        if not self.delivery.grace:
            self.abort(error)
            return
        loop = asyncio.get_running_loop()
        self._disconnect_timer = loop.call_later(self.delivery.grace, self.abort, error)

    async def encoded_preview(self, encoder: Encoder, preview: PreviewReady, options: PreviewOptions) -> EncodedImage:
        """Returns a preview as a JPEG. It is encoded once for all readers that want the same size and quality."""
        key = (options.max_edge, options.quality)
        held = self._renditions.get(key)
        if held is None or held[0] is not preview:
            size = self.job.output.size
            held = preview, asyncio.ensure_future(encoder.preview(preview.pixels, options, size))
            self._renditions[key] = held
            while len(self._renditions) > _MAX_RENDITIONS:
                self._renditions.popitem(last=False)
        # Shielded: a reader that leaves must not cancel the encoding for the others.
        return await asyncio.shield(held[1])

    def _cancel_disconnect_timer(self) -> None:
        if self._disconnect_timer is not None:
            self._disconnect_timer.cancel()
            self._disconnect_timer = None


def _restored(record: Record, image: bytes | None) -> State:
    """Returns the state after a restart: the end, or the beginning if the generation had not ended."""
    if record.end is None:
        return State()
    stored = record.end
    end: Succeeded | Failed
    if stored.image is not None and image is not None:
        file = EncodedImage(stored.image.format, stored.image.width, stored.image.height, image)
        end = Succeeded(file, stored.timings, stored.finished_early)
    else:
        end = Failed(stored.error or errors.DataLoss("The stored image is damaged."), stored.timings)
    return advance(State(step=stored.step, total_steps=stored.total_steps, notices=stored.notices), end)
