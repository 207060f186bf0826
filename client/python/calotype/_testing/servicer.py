"""What `calotype.testing.FakeServer` serves: generations that follow a script, and the calls that lead to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from .._convert import wire_names
from .._errors import (
    AlreadyExists,
    CalotypeError,
    Cancelled,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Unauthenticated,
)
from .._options import PreviewMethod
from .._request import fill
from .._status import DETAILS_KEY
from .._types import Model, Notice
from ..v1 import calotype_pb2 as v1
from ..v1.calotype_pb2_grpc import GenerationServiceServicer
from .images import make_image, sample_jpeg

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .._image import Image
    from ..testing import FakeServer

__all__ = ["FakeGeneration", "KeyCheckInterceptor", "Script", "Servicer"]

_CANCELLED = Cancelled("The generation was cancelled.", reason="CANCELLED")
_WITHHELD = FailedPrecondition("The safety checker of the model withheld the picture.", reason="CONTENT_WITHHELD")
_EPOCH = 1_700_000_000


@dataclass(frozen=True, kw_only=True)
class Script:
    """What generations do, see `FakeServer`."""

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


@dataclass
class FakeGeneration:
    """One generation: a log that grows when somebody reads it."""

    id: str
    number: int
    request: v1.GenerateRequest
    script: Script
    log: list[v1.Progress] = field(default_factory=list)
    cancelled: bool = False
    finishing: bool = False
    readers: int = 0
    error: CalotypeError | None = None

    def __post_init__(self) -> None:
        self._messages = self._number(self._play())

    @property
    def total(self) -> int:
        """Denoising steps in all."""
        return self.script.steps or self.request.step_count or self.script.model.steps

    @property
    def phase(self) -> v1.Phase.ValueType:
        """Where it stands."""
        phase = self.log[-1].phase if self.log else v1.PHASE_QUEUED
        return v1.PHASE_CANCELLED if self.cancelled and phase < v1.PHASE_SUCCEEDED else phase

    @property
    def ended(self) -> bool:
        """Whether its end is in the log, all of it."""
        last = self.log[-1] if self.log else v1.Progress()
        return last.phase >= v1.PHASE_SUCCEEDED and last.chunk_index + 1 >= last.chunk_count

    @property
    def standing_still(self) -> bool:
        """Whether it is at the step where the script holds it."""
        last = self.log[-1] if self.log else v1.Progress()
        held = last.phase == v1.PHASE_DENOISING and last.step == self.script.hold_at
        return held and not (self.cancelled or self.finishing)

    def advance(self) -> v1.Progress:
        """Does what comes next, and returns its message."""
        self.log.append(next(self._messages))
        return self.log[-1]

    def position(self, after: int) -> int:
        """Returns where in the log a reader begins that knows what came up to `after`."""
        pictures = [index for index, message in enumerate(self.log) if message.image and message.chunk_index == 0]
        start = pictures[-1] if pictures else 0
        if self.log and self.phase > v1.PHASE_SUCCEEDED:
            start = len(self.log) - 1
        return next((index for index in range(start, len(self.log)) if self.log[index].sequence > after), len(self.log))

    def _number(self, messages: Iterator[v1.Progress]) -> Iterator[v1.Progress]:
        sequence, withdrawn = 0, False
        for message in messages:
            sequence += message.chunk_index == 0  # the chunks of one image share a number
            withdrawn = withdrawn or self._withdrawn(message.step)
            message.generation_id, message.sequence, message.total_steps = self.id, sequence, self.total
            message.seed = self.request.seed if self.request.HasField("seed") else 1234
            message.previews_withdrawn = withdrawn
            message.warnings.extend(v1.Warning(reason=n.reason, message=n.message) for n in self.script.warnings)
            yield message

    def _withdrawn(self, step: int) -> bool:
        return self.script.withdraw_at is not None and step >= self.script.withdraw_at

    def _play(self) -> Iterator[v1.Progress]:
        step, script = 0, self.script
        for message in self._work():
            if self.cancelled:
                break
            step = message.step
            yield message
            if script.error is not None and message.phase == v1.PHASE_DENOISING and step == script.fail_at:
                yield self._fail(step, script.error)
                return
            if self.finishing and step:
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
        total, script, preview = self.total, self.script, sample_jpeg()
        every, method = _previews_of(self.request, script.model)
        yield v1.Progress(phase=v1.PHASE_QUEUED, queue_position=1)
        yield v1.Progress(phase=v1.PHASE_ENCODING_PROMPT, estimated_remaining=_duration(total))
        for step in range(total + 1):
            message = v1.Progress(phase=v1.PHASE_DENOISING, step=step, estimated_remaining=_duration(total - step))
            due = step and (step % every == 0 or step == total) and method != v1.PREVIEW_METHOD_NONE
            if script.previews and due and not self._withdrawn(step):
                message.image, message.image_format = preview.data, v1.IMAGE_FORMAT_JPEG
                message.image_kind, message.image_step = v1.IMAGE_KIND_PREDICTED, step
                message.width_px, message.height_px = preview.width, preview.height
                message.preview_method = method
            yield message

    def _fail(self, step: int, error: CalotypeError) -> v1.Progress:
        self.error = error
        phase = v1.PHASE_CANCELLED if isinstance(error, Cancelled) else v1.PHASE_FAILED
        return v1.Progress(phase=phase, step=step, error=_error_message(error))

    def _succeed(self, step: int) -> Iterator[v1.Progress]:
        request, script = self.request, self.script
        kind = wire_names(v1.ImageFormat.DESCRIPTOR).get(request.output.format, "png")
        width, height = request.width_px or script.model.width, request.height_px or script.model.height
        image = script.image or make_image(kind, width, height)
        size = script.chunk_bytes or len(image.data)
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
                timings=v1.Timings(denoising=_duration(step), total=_duration(step)),
                finished_early=step < self.total,
            )


class KeyCheckInterceptor(grpc.ServerInterceptor):
    """Refuses calls without the key, as the real server does."""

    def __init__(self, api_key: str) -> None:
        self._expected = f"Bearer {api_key}"

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        given = dict(handler_call_details.invocation_metadata).get("authorization")
        if given == self._expected:
            return continuation(handler_call_details)
        reason = "KEY_REQUIRED" if given is None else "KEY_INVALID"
        error = Unauthenticated(
            "The API key is not valid." if given else "This server asks for an API key.", reason=reason
        )
        return grpc.unary_stream_rpc_method_handler(lambda _, context: _abort(context, error))


class Servicer(GenerationServiceServicer):
    """The calls."""

    def __init__(self, server: FakeServer) -> None:
        self._fake, self._script = server, server._script

    def GetModel(self, request: v1.GetModelRequest, context: Any) -> v1.Model:  # noqa: N802
        model = self._script.model
        names = {"width": "width_px", "height": "height_px", "size_multiple": "size_multiple_px"}
        names |= {"steps": "step_count", "max_steps": "max_step_count", "max_preview_edge": "max_preview_edge_px"}
        plain = {names.get(name, name): getattr(model, name) for name in Model.__dataclass_fields__}
        methods = [_method_to_proto(method) for method in plain.pop("preview_methods")]
        answer = v1.Model(preview_methods=methods, **{name: plain[name] for name in plain if name != "previews"})
        fill(answer, {"previews": model.previews})
        return answer

    def Cancel(self, request: v1.CancelRequest, context: Any) -> v1.CancelResponse:  # noqa: N802
        with self._fake._changed:
            generation = self._find(request.generation_id, context)
            found = generation.phase
            self._fake._cancel(generation)
        return v1.CancelResponse(phase=found)

    def Finish(self, request: v1.FinishRequest, context: Any) -> v1.FinishResponse:  # noqa: N802
        with self._fake._changed:
            generation = self._find(request.generation_id, context)
            found = generation.phase
            generation.finishing = True
            self._fake._changed.notify_all()
        return v1.FinishResponse(phase=found)

    def ListGenerations(  # noqa: N802
        self, request: v1.ListGenerationsRequest, context: Any
    ) -> v1.ListGenerationsResponse:
        with self._fake._changed:
            newest = [_summary(generation) for generation in reversed(self._fake._generations.values())]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 50)
        return v1.ListGenerationsResponse(
            generations=newest[start:end], next_page_token=str(end) if end < len(newest) else ""
        )

    def Generate(self, request: v1.GenerateRequest, context: Any) -> Iterator[v1.Progress]:  # noqa: N802
        fake, script = self._fake, self._script
        with fake._changed:
            fake.requests.append(request)
            number = len(fake.requests)
            if script.error is not None and script.fail_at is None:
                _abort(context, script.error)
            generation = self._known(request, context)
            if generation is None:
                generation = FakeGeneration(f"fake-{number}", number, request, script)
                fake._generations[generation.id] = generation
            start = generation.position(0) if generation.ended else 0
        yield from self._follow(generation, start, v1.PreviewOptions(), context)

    def Watch(self, request: v1.WatchRequest, context: Any) -> Iterator[v1.Progress]:  # noqa: N802
        with self._fake._changed:
            self._fake.watched.append(request)
            generation = self._find(request.generation_id, context)
            start = generation.position(request.after_sequence)
        yield from self._follow(generation, start, request.preview, context)

    def _find(self, generation_id: str, context: Any) -> FakeGeneration:
        generation = self._fake._generations.get(generation_id)
        if generation is None:
            _abort(context, NotFound(f"There is no generation {generation_id!r}.", reason="GENERATION_NOT_FOUND"))
        assert generation is not None
        return generation

    def _known(self, request: v1.GenerateRequest, context: Any) -> FakeGeneration | None:
        for generation in self._fake._generations.values():
            if request.request_id and generation.request.request_id == request.request_id:
                if generation.request != request:
                    _abort(context, AlreadyExists("It was used for another request.", reason="REQUEST_ID_REUSED"))
                return generation
        return None

    def _follow(
        self, generation: FakeGeneration, start: int, preview: v1.PreviewOptions, context: Any
    ) -> Iterator[v1.Progress]:
        fake = self._fake

        def left() -> None:
            with fake._changed:
                generation.readers -= 1
                fake._left(generation)

        with fake._changed:
            generation.readers += 1
            cuts = fake._cuts
        if not context.add_callback(left):
            left()
            return
        index = start
        while (message := self._next(generation, index, cuts, context)) is not None:
            if preview.method == v1.PREVIEW_METHOD_NONE and message.image_kind == v1.IMAGE_KIND_PREDICTED:
                message.ClearField("image")
            yield message
            fake._sent(message)
            index += 1
        if generation.error is not None:
            _abort(context, generation.error)

    def _next(self, generation: FakeGeneration, index: int, cuts: int, context: Any) -> v1.Progress | None:
        """Waits for a message of the log; None after the last, and when there is nobody left to send it to."""
        fake, log = self._fake, generation.log

        def ready() -> bool:
            there = index < len(log) or generation.ended or fake._may_advance(generation)
            return there or fake._cuts != cuts or not context.is_active()

        with fake._changed:
            fake._changed.wait_for(ready)
            if fake._cuts != cuts:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Connection lost.")
            if not context.is_active() or (generation.ended and index >= len(log)):
                return None
            if index == len(log):
                generation.advance()
            message = v1.Progress()
            message.CopyFrom(log[index])
            return message


def _summary(generation: FakeGeneration) -> v1.GenerationSummary:
    last = generation.log[-1] if generation.log else v1.Progress()
    return v1.GenerationSummary(
        generation_id=generation.id,
        request_id=generation.request.request_id,
        prompt=generation.request.prompt,
        phase=generation.phase,
        step=last.step,
        total_steps=last.total_steps,
        seed=last.seed,
        create_time=Timestamp(seconds=_EPOCH + generation.number),
    )


def _previews_of(request: v1.GenerateRequest, model: Model) -> tuple[int, v1.PreviewMethod.ValueType]:
    """Returns after how many steps each a preview comes, and what is said to draw it."""
    asked = request.preview
    every = asked.every_steps or model.previews.every_steps or 1
    method = asked.method or _method_to_proto(model.previews.method or PreviewMethod.AUTO)
    if method == v1.PREVIEW_METHOD_AUTO:
        method = _method_to_proto((*model.preview_methods, PreviewMethod.NONE)[0])
    return every, method


def _method_to_proto(method: str) -> v1.PreviewMethod.ValueType:
    return v1.PreviewMethod.Value(f"PREVIEW_METHOD_{method.upper()}")


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))


def _error_message(error: CalotypeError) -> v1.Error:
    delay = None if error.retry_after is None else _duration(error.retry_after)
    code = grpc.StatusCode[error.code].value[0]
    return v1.Error(code=code, reason=error.reason, message=error.message, retry_delay=delay)


def _abort(context: Any, error: CalotypeError) -> None:
    """Ends a call as the real server does: with a status that has details."""
    code = grpc.StatusCode[error.code]
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain="calotype", metadata=error.metadata)]
    if error.retry_after is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after)))
    if isinstance(error, InvalidRequest):
        violations = [{"field": field, "description": text} for field, text in error.violations]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    status = status_pb2.Status(code=code.value[0], message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
    context.abort(code, error.message)
