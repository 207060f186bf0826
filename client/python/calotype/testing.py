"""A Calotype server for tests: a real gRPC server in this process, with a script instead of a model.

Usage::

    from calotype import Client
    from calotype.testing import FakeServer

    def test_our_own_code():
        with FakeServer(steps=4) as server, Client(server.address) as client:
            image = client.generate("a red apple", seed=1).result()
        assert image.format == "png"
        assert server.requests[0].prompt == "a red apple"

A generation that stands still at a step makes cancellation testable without sleeping::

    with FakeServer(steps=4, hold_at=2) as server, Client(server.address) as client:
        for progress in client.generate("a red apple"):
            if progress.step == 2:
                break
        assert server.wait_cancelled()
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from ._convert import wire_names
from ._errors import CalotypeError, Cancelled, FailedPrecondition, InvalidRequest, NotFound
from ._options import PreviewMethod, Previews
from ._request import fill
from ._samples import make_image, sample_jpeg
from ._status import DETAILS_KEY
from ._types import Model, Notice
from .v1 import calotype_pb2 as v1
from .v1.calotype_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from ._image import Image

__all__ = ["FakeServer"]

_MODEL = Model(
    name="fake",
    pipeline="FakePipeline",
    width=64,
    height=64,
    size_multiple=8,
    max_pixels=512 * 512,
    steps=4,
    max_steps=100,
    guidance_scale=5.0,
    takes_negative_prompt=True,
    scheduler="DDIMScheduler",
    schedulers=("DDIMScheduler", "EulerDiscreteScheduler"),
    max_prompt_chars=2000,
    max_prompt_tokens=77,
    preview_methods=(PreviewMethod.HEAD, PreviewMethod.FULL_VAE),
    previews=Previews(every_steps=1, min_interval=0.0, max_edge=256, quality=75, method=PreviewMethod.AUTO),
    max_preview_edge=1024,
    max_preview_quality=95,
    max_active=1,
    max_batch_rows=0,
    unbatched_reason="",
    device="cpu",
    dtype="float32",
    server_version="0",
)
_WITHHELD = FailedPrecondition("The safety checker of the model withheld the picture.", reason="CONTENT_WITHHELD")


class FakeServer:
    """A server that follows a script: queued, encoding, the steps with a preview each, and the image.

    Of the options, it follows the steps, the size, the format, and how often previews come; a preview looks the same
    whatever is asked for. It does not validate: whatever a client can send is served.

    Attributes:
        requests: The requests received, oldest first.
        cancelled: Ids of the generations that were cancelled or left before their end, oldest first.
    """

    def __init__(
        self,
        *,
        steps: int | None = None,
        previews: bool = True,
        image: Image | None = None,
        chunk_bytes: int | None = None,
        warnings: Sequence[Notice] = (),
        error: CalotypeError | None = None,
        fail_at: int | None = None,
        hold_at: int | None = None,
        withdraw_at: int | None = None,
        model: Model = _MODEL,
    ) -> None:
        """Makes a server; entering the context starts it.

        Args:
            steps: Number of denoising steps. Default: what the request asks for, else that of the model.
            previews: Whether steps come with previews, as often as the request asks for, else at each step.
            image: The final image. Default: one of the format and the size that the request asks for, else a PNG of
                the size of the model.
            chunk_bytes: Sends the final image in chunks of at most this size. Default: whole.
            warnings: Goes with every message.
            error: How every generation ends. Default: with the image.
            fail_at: Step after which `error` comes, as the last message. Default: before the first message, as when
                the server refuses a request.
            hold_at: Step after which generations stand still until `release`.
            withdraw_at: Step, 1 or later, with which previews are withdrawn; generations then fail with the reason
                CONTENT_WITHHELD in the place of their image.
            model: The answer to `Client.model`.
        """
        self.requests: list[v1.GenerateRequest] = []
        self.cancelled: list[str] = []
        self._steps, self._previews, self._image, self._chunk_bytes = steps, previews, image, chunk_bytes
        self._warnings = [v1.Warning(reason=notice.reason, message=notice.message) for notice in warnings]
        self._error, self._fail_at, self._hold_at, self._withdraw_at = error, fail_at, hold_at, withdraw_at
        self._model = model
        self._phases: dict[str, v1.Phase.ValueType] = {}
        self._released = False
        self._changed = threading.Condition()
        self._server: grpc.Server | None = None

    def start(self) -> Self:
        """Starts to serve on a free port of 127.0.0.1."""
        # The interval lets clients ping as often as `Client` does.
        options = (("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),)
        server = grpc.server(ThreadPoolExecutor(16, "fake-calotype"), options=options)
        add_GenerationServiceServicer_to_server(_Servicer(self), server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        self._server = server
        return self

    def stop(self) -> None:
        """Cuts all connections and stops. Can be called again."""
        if self._server is not None:
            stopped = self._server.stop(None)
            self.release()
            stopped.wait()

    def release(self) -> None:
        """Lets the generations go on that stand still, and all later ones."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def wait_cancelled(self, timeout: float = 10.0, *, count: int = 1) -> bool:
        """Waits until generations were cancelled or left.

        Args:
            timeout: How long to wait at most, in seconds.
            count: How many.

        Returns:
            Whether there were that many in time.
        """
        with self._changed:
            return self._changed.wait_for(lambda: len(self.cancelled) >= count, timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class _Servicer(GenerationServiceServicer):
    def __init__(self, server: FakeServer) -> None:
        self._fake = server

    def GetModel(self, request: v1.GetModelRequest, context: Any) -> v1.Model:  # noqa: N802
        model = self._fake._model
        names = {"width": "width_px", "height": "height_px", "size_multiple": "size_multiple_px"}
        names |= {"steps": "step_count", "max_steps": "max_step_count", "max_preview_edge": "max_preview_edge_px"}
        plain = {names.get(name, name): getattr(model, name) for name in Model.__dataclass_fields__}
        methods = [_method_to_proto(method) for method in plain.pop("preview_methods")]
        answer = v1.Model(preview_methods=methods, **{name: plain[name] for name in plain if name != "previews"})
        fill(answer, {"previews": model.previews})
        return answer

    def Cancel(self, request: v1.CancelRequest, context: Any) -> v1.CancelResponse:  # noqa: N802
        fake, generation = self._fake, request.generation_id
        with fake._changed:
            found = fake._phases.get(generation, v1.PHASE_UNSPECIFIED)
            if found:
                _end_early(fake, generation)
        if not found:
            _abort(context, NotFound(f"There is no generation {generation!r}.", reason="GENERATION_NOT_FOUND"))
        return v1.CancelResponse(phase=found)

    def Generate(self, request: v1.GenerateRequest, context: Any) -> Iterator[v1.Progress]:  # noqa: N802
        fake = self._fake
        with fake._changed:
            fake.requests.append(request)
            number = len(fake.requests)
        if fake._error is not None and fake._fail_at is None:
            _abort(context, fake._error)
        generation = f"fake-{number}"

        def left() -> None:
            with fake._changed:
                _end_early(fake, generation)

        if context.add_callback(left):
            yield from self._run(request, context, generation)

    def _run(self, request: v1.GenerateRequest, context: Any, generation: str) -> Iterator[v1.Progress]:
        fake, model = self._fake, self._fake._model
        total = fake._steps or request.step_count or model.steps
        error: CalotypeError | None = None
        sequence, withdrawn = 0, False
        for message in self._script(request, total):
            sequence += message.chunk_index == 0  # the chunks of one image share a number
            with fake._changed:
                if fake._phases.get(generation) == v1.PHASE_CANCELLED:
                    error = Cancelled("The generation was cancelled.", reason="CANCELLED")
                    message.Clear()
                    message.MergeFrom(v1.Progress(phase=v1.PHASE_CANCELLED, error=_error_message(error)))
                elif message.HasField("error"):
                    error = _WITHHELD if message.error.reason == _WITHHELD.reason else fake._error
                fake._phases[generation] = message.phase
            message.generation_id, message.sequence, message.total_steps = generation, sequence, total
            message.seed = request.seed if request.HasField("seed") else 1234
            withdrawn = withdrawn or _withdrawn(fake, message.step)
            message.previews_withdrawn = withdrawn
            message.warnings.extend(fake._warnings)
            yield message
            if error is not None:
                _abort(context, error)
            if message.phase == v1.PHASE_DENOISING and message.step == fake._hold_at:
                with fake._changed:
                    fake._changed.wait_for(
                        lambda: (
                            fake._released or fake._phases[generation] == v1.PHASE_CANCELLED or not context.is_active()
                        )
                    )

    def _script(self, request: v1.GenerateRequest, total: int) -> Iterator[v1.Progress]:
        fake, model, preview = self._fake, self._fake._model, sample_jpeg()
        every, method = _previews_of(request, model)
        yield v1.Progress(phase=v1.PHASE_QUEUED, queue_position=1)
        yield v1.Progress(phase=v1.PHASE_ENCODING_PROMPT, estimated_remaining=_duration(total))
        for step in range(total + 1):
            message = v1.Progress(phase=v1.PHASE_DENOISING, step=step, estimated_remaining=_duration(total - step))
            due = step and (step % every == 0 or step == total) and method != v1.PREVIEW_METHOD_NONE
            if fake._previews and due and not _withdrawn(fake, step):
                message.image, message.image_format = preview.data, v1.IMAGE_FORMAT_JPEG
                message.image_kind, message.image_step = v1.IMAGE_KIND_PREDICTED, step
                message.width_px, message.height_px = preview.width, preview.height
                message.preview_method = method
            yield message
            if fake._error is not None and step == fake._fail_at:
                phase = v1.PHASE_CANCELLED if isinstance(fake._error, Cancelled) else v1.PHASE_FAILED
                yield v1.Progress(phase=phase, step=step, error=_error_message(fake._error))
        yield v1.Progress(phase=v1.PHASE_DECODING, step=total)
        if fake._withdraw_at is not None:
            yield v1.Progress(phase=v1.PHASE_FAILED, step=total, error=_error_message(_WITHHELD))
        kind = wire_names(v1.ImageFormat.DESCRIPTOR).get(request.output.format, "png")
        width, height = request.width_px or model.width, request.height_px or model.height
        image = fake._image or make_image(kind, width, height)
        size = fake._chunk_bytes or len(image.data)
        starts = range(0, len(image.data), size)
        for index, start in enumerate(starts):
            yield v1.Progress(
                phase=v1.PHASE_SUCCEEDED,
                step=total,
                image=image.data[start : start + size],
                image_format=v1.ImageFormat.Value(f"IMAGE_FORMAT_{image.format.upper()}"),
                image_kind=v1.IMAGE_KIND_FINAL,
                image_step=total,
                width_px=image.width,
                height_px=image.height,
                chunk_index=index,
                chunk_count=len(starts),
                timings=v1.Timings(denoising=_duration(total), total=_duration(total)),
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


def _withdrawn(fake: FakeServer, step: int) -> bool:
    return fake._withdraw_at is not None and step >= fake._withdraw_at


def _end_early(fake: FakeServer, generation: str) -> None:
    """Notes that a generation was cancelled or left, unless it had ended. Needs the lock."""
    if fake._phases.get(generation, v1.PHASE_QUEUED) < v1.PHASE_SUCCEEDED:
        fake._phases[generation] = v1.PHASE_CANCELLED
        fake.cancelled.append(generation)
    fake._changed.notify_all()


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
