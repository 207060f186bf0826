"""A generation that follows a script, for `calotype.testing`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from .._convert import wire_names
from .._errors import CalotypeError, Cancelled, FailedPrecondition
from .._options import PreviewMethod
from ..v1 import calotype_pb2 as v1
from .images import make_image, sample_jpeg
from .wire import error_to_proto, method_to_proto, seconds_to_proto

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .._image import Image
    from .._types import Model, Notice

__all__ = ["FakeGeneration", "Script"]

_CANCELLED = Cancelled("The generation was cancelled.", reason="CANCELLED")
_WITHHELD = FailedPrecondition("The model's safety checker withheld the image.", reason="CONTENT_WITHHELD")
_DEFAULT_SEED = 1234
_EPOCH = 1_700_000_000


@dataclass(frozen=True, kw_only=True)
class Script:
    """The script that every generation follows. `FakeServer` documents the fields."""

    model: Model
    steps: int | None = None
    previews: bool = True
    image: Image | None = None
    chunk_bytes: int | None = None
    warnings: Sequence[Notice] = ()
    error: CalotypeError | None = None
    fail_at: int | None = None
    hold_at: int | None = None
    withdraw_at: int | None = None


class FakeGeneration:
    """One generation. It advances when a reader needs its next message.

    Args:
        number: Counts the requests of the server from 1.
        request: The request that started it.
        script: Its steps, previews and failures.

    Attributes:
        id: Its generation id.
        request: The request that started it.
        events: Its messages so far.
        error: The error with which it ended.
        cancelled: Whether it was cancelled.
    """

    def __init__(self, number: int, request: v1.GenerateRequest, script: Script) -> None:
        self.id = f"fake-{number}"
        self.request = request
        self.events: list[v1.Progress] = []
        self.error: CalotypeError | None = None
        self.cancelled = False
        self._number = number
        self._script = script
        self._finishing = False
        self._readers = 0
        self._messages = self._play()

    @property
    def total_steps(self) -> int:
        """Number of denoising steps."""
        return self._script.steps or self.request.step_count or self._script.model.steps

    @property
    def phase(self) -> v1.Phase.ValueType:
        """Phase of the newest message, or CANCELLED once it is cancelled."""
        phase = self._last.phase if self.events else v1.PHASE_QUEUED
        return v1.PHASE_CANCELLED if self.cancelled and phase < v1.PHASE_SUCCEEDED else phase

    @property
    def ended(self) -> bool:
        """Whether the last message of its end, the last chunk of an image included, is among its events."""
        return self._last.phase >= v1.PHASE_SUCCEEDED and self._last.chunk_index + 1 >= self._last.chunk_count

    @property
    def holds(self) -> bool:
        """Whether it is at the step at which the script holds it."""
        is_held = self._last.phase == v1.PHASE_DENOISING and self._last.step == self._script.hold_at
        return is_held and not (self.cancelled or self._finishing)

    @property
    def has_readers(self) -> bool:
        """Whether any reader follows it."""
        return self._readers > 0

    def add_reader(self) -> None:
        """Counts a reader."""
        self._readers += 1

    def remove_reader(self) -> None:
        """Stops counting a reader."""
        self._readers -= 1

    def cancel(self) -> bool:
        """Ends it without an image. Returns False when it has ended or is cancelled already."""
        if self.phase >= v1.PHASE_SUCCEEDED:
            return False
        self.cancelled = True
        return True

    def finish(self) -> None:
        """Ends it with an image after its current step."""
        self._finishing = True

    def advance(self) -> None:
        """Adds its next message to its events."""
        self.events.append(next(self._messages))

    def position(self, after: int) -> int:
        """Returns the index of the first event for a reader that has seen everything up to sequence `after`."""
        pictures = [index for index, message in enumerate(self.events) if message.image and message.chunk_index == 0]
        start = pictures[-1] if pictures else 0
        if self.events and self.phase > v1.PHASE_SUCCEEDED:
            start = len(self.events) - 1
        unseen = (index for index in range(start, len(self.events)) if self.events[index].sequence > after)
        return next(unseen, len(self.events))

    def summary(self) -> v1.GenerationSummary:
        """Returns its entry in the list of generations."""
        return v1.GenerationSummary(
            generation_id=self.id,
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            phase=self.phase,
            step=self._last.step,
            total_steps=self._last.total_steps,
            seed=self._last.seed,
            group=self.request.group,
            create_time=Timestamp(seconds=_EPOCH + self._number),
        )

    @property
    def _last(self) -> v1.Progress:
        return self.events[-1] if self.events else v1.Progress()

    def _play(self) -> Iterator[v1.Progress]:
        """Yields all messages, with the fields that every message has."""
        sequence, withdrawn = 0, False
        for message in self._phases():
            sequence += message.chunk_index == 0  # the chunks of one image share a number
            withdrawn = withdrawn or self._withdraws(message.step)
            message.generation_id, message.sequence, message.total_steps = self.id, sequence, self.total_steps
            message.seed = (
                self.request.seed if self.request.HasField("seed") and self.request.seed >= 0 else _DEFAULT_SEED
            )
            message.previews_withdrawn = withdrawn
            message.warnings.extend(v1.Warning(reason=n.reason, message=n.message) for n in self._script.warnings)
            yield message

    def _withdraws(self, step: int) -> bool:
        return self._script.withdraw_at is not None and step >= self._script.withdraw_at

    def _phases(self) -> Iterator[v1.Progress]:
        step, script = 0, self._script
        for message in self._work():
            if self.cancelled:
                break
            step = message.step
            yield message
            if script.error is not None and message.phase == v1.PHASE_DENOISING and step == script.fail_at:
                yield self._fail(step, script.error)
                return
            if self._finishing and step:
                break
        if not self.cancelled:
            yield v1.Progress(phase=v1.PHASE_DECODING, step=step)
        if self.cancelled:
            yield self._fail(step, _CANCELLED)
        elif script.withdraw_at is not None:
            yield self._fail(step, _WITHHELD)
        else:
            yield from self._succeed(step)

    def _work(self) -> Iterator[v1.Progress]:
        total, preview = self.total_steps, sample_jpeg()
        every, method = self._preview_options()
        yield v1.Progress(phase=v1.PHASE_QUEUED, queue_position=1)
        yield v1.Progress(phase=v1.PHASE_ENCODING_PROMPT, estimated_remaining=seconds_to_proto(total))
        for step in range(total + 1):
            left = seconds_to_proto(total - step)
            message = v1.Progress(phase=v1.PHASE_DENOISING, step=step, estimated_remaining=left)
            due = step and (step % every == 0 or step == total) and method != v1.PREVIEW_METHOD_NONE
            if self._script.previews and due and not self._withdraws(step):
                message.image, message.image_format = preview.data, v1.IMAGE_FORMAT_JPEG
                message.image_kind, message.image_step = v1.IMAGE_KIND_PREDICTED, step
                message.width_px, message.height_px = preview.width, preview.height
                message.preview_method = method
            yield message

    def _preview_options(self) -> tuple[int, v1.PreviewMethod.ValueType]:
        """Returns the number of steps between previews, and their method."""
        asked, model = self.request.preview, self._script.model
        every = asked.every_steps or model.previews.every_steps or 1
        method = asked.method or method_to_proto(model.previews.method or PreviewMethod.AUTO)
        if method == v1.PREVIEW_METHOD_AUTO:
            method = method_to_proto((*model.preview_methods, PreviewMethod.NONE)[0])
        return every, method

    def _fail(self, step: int, error: CalotypeError) -> v1.Progress:
        self.error = error
        phase = v1.PHASE_CANCELLED if isinstance(error, Cancelled) else v1.PHASE_FAILED
        return v1.Progress(phase=phase, step=step, error=error_to_proto(error))

    def _succeed(self, step: int) -> Iterator[v1.Progress]:
        image = self._final_image()
        size = self._script.chunk_bytes or len(image.data)
        starts = range(0, len(image.data), size)
        for index, start in enumerate(starts):
            yield v1.Progress(
                phase=v1.PHASE_SUCCEEDED,
                step=step,
                image=image.data[start : start + size],
                image_format=v1.ImageFormat.Value(f"IMAGE_FORMAT_{image.format.upper()}"),
                image_kind=v1.IMAGE_KIND_FINAL,
                image_step=step,
                width_px=image.width,
                height_px=image.height,
                chunk_index=index,
                chunk_count=len(starts),
                timings=v1.Timings(denoising=seconds_to_proto(step), total=seconds_to_proto(step), computed_steps=step),
                finished_early=step < self.total_steps,
            )

    def _final_image(self) -> Image:
        request, script = self.request, self._script
        image_format = wire_names(v1.ImageFormat.DESCRIPTOR).get(request.output.format, "png")
        width, height = request.width_px or script.model.width, request.height_px or script.model.height
        return script.image or make_image(image_format, width, height)
