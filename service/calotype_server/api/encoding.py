"""Converts events, models and errors to protobuf messages."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.enums import IMAGE_FORMATS, PHASES, PREVIEW_METHODS, PROMPT_SYNTAXES, SIGMAS, SPACINGS
from calotype_server.api.sizes import offered_sizes
from calotype_server.errors import InvalidRequest, ServiceError
from calotype_server.types import EncodedImage, Failed, Phase, Succeeded, Timings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from calotype_server.generations.event_log import Update
    from calotype_server.generations.generation import Generation
    from calotype_server.limits import Limits
    from calotype_server.types import ModelInfo, SchedulerInfo

__all__ = ["DOMAIN", "encode_error", "encode_model", "encode_page", "encode_status", "encode_update"]

DOMAIN = "calotype"
"""`google.rpc.ErrorInfo.domain` of every error."""

_CHUNK_BYTES = 3 * 1024 * 1024
"""Bytes of the final image per message: well below 4 MiB, the default limit of every gRPC client."""


def encode_update(
    generation_id: str, seed: int, update: Update, image: EncodedImage | None, *, whole: bool = False
) -> Iterator[pb.Progress]:
    """Yields the messages of an update: one, or several when the final image needs several chunks.

    Args:
        generation_id: Id of the generation.
        seed: Seed of the generation.
        update: A snapshot of the generation.
        image: The encoded preview of the update, or None.
        whole: Whether to send the final image in one message, regardless of its size.
    """
    state = update.state
    progress = pb.Progress(
        generation_id=generation_id,
        sequence=state.sequence,
        phase=PHASES.to_proto(state.phase),
        step=state.step,
        total_steps=state.total_steps,
        queue_position=state.queue_position,
        estimated_remaining=_duration(state.estimated_remaining),
        previews_dropped=update.previews_dropped,
        seed=seed,
        previews_withdrawn=state.withdrawn,
        finished_early=state.finished_early and state.phase is Phase.SUCCEEDED,
        not_persisted=state.end is not None and not state.end.persisted,
        warnings=[pb.Warning(reason=notice.reason, message=notice.message) for notice in state.notices],
    )
    match state.end:
        case None:
            if image is not None and update.preview is not None:
                _describe_image(progress, image, pb.IMAGE_KIND_PREDICTED, update.preview.step)
                progress.preview_method = PREVIEW_METHODS.to_proto(update.preview.method)
                progress.image = image.data
            yield progress
        case Failed(error, timings):
            progress.timings.CopyFrom(_timings(timings))
            progress.error.CopyFrom(
                pb.Error(
                    code=Code.Value(error.code),
                    reason=error.reason,
                    message=error.message,
                    retry_delay=_duration(error.retry_after),
                )
            )
            yield progress
        case Succeeded(final, timings):
            progress.timings.CopyFrom(_timings(timings))
            _describe_image(progress, final, pb.IMAGE_KIND_FINAL, state.step)
            size = len(final.data) if whole else _CHUNK_BYTES
            progress.chunk_count = -(-len(final.data) // size)
            for index in range(progress.chunk_count):
                data = final.data[index * size : (index + 1) * size]
                chunk = pb.Progress(chunk_index=index, image=data)
                chunk.MergeFrom(progress)
                yield chunk


def encode_page(generations: Sequence[Generation], size: int) -> pb.ListGenerationsResponse:
    """Returns a page with the first `size` of `generations`, newest first, and the token of the next page."""
    page = pb.ListGenerationsResponse(generations=[_summary(each) for each in generations[:size]])
    if len(generations) > size:
        page.next_page_token = str(generations[size - 1].created_ns)
    return page


def _summary(generation: Generation) -> pb.GenerationSummary:
    state = generation.events.state
    summary = pb.GenerationSummary(
        generation_id=generation.id,
        request_id=generation.delivery.request_id,
        prompt=generation.job.prompt,
        phase=PHASES.to_proto(state.phase),
        step=state.step,
        total_steps=state.total_steps,
        seed=generation.job.seed,
        group=generation.delivery.group,
    )
    summary.create_time.FromNanoseconds(generation.created_ns)
    return summary


def encode_model(model: ModelInfo, limits: Limits, server_version: str, replica: str) -> pb.Model:
    """Returns the response to `GetModel`."""
    max_steps = model.max_steps(model.scheduler, limits.max_step_count)
    return pb.Model(
        name=model.name,
        pipeline=model.pipeline,
        width_px=model.width,
        height_px=model.height,
        size_multiple_px=model.size_multiple,
        max_pixels=limits.max_pixels,
        step_count=min(model.step_count, max_steps),
        max_step_count=max_steps,
        guidance_scale=model.guidance_scale,
        takes_negative_prompt=model.takes_negative_prompt,
        scheduler=model.scheduler,
        schedulers=model.schedulers,
        max_prompt_chars=limits.max_prompt_chars,
        max_prompt_tokens=model.max_prompt_tokens,
        device=model.device,
        dtype=model.dtype,
        server_version=server_version,
        preview_methods=[
            PREVIEW_METHODS.to_proto(each) for each in model.preview_methods if each in limits.preview_methods
        ],
        preview=pb.PreviewOptions(
            every_steps=limits.preview.every_steps,
            min_interval=_duration(limits.preview.min_interval),
            max_edge_px=limits.preview.max_edge,
            quality=limits.preview.quality,
            method=PREVIEW_METHODS.to_proto(limits.preview.method),
        ),
        max_preview_edge_px=limits.max_preview_edge,
        max_preview_quality=limits.max_preview_quality,
        max_active=model.max_active,
        max_batch_rows=model.max_batch_rows,
        unbatched_reason=model.unbatched_reason,
        accelerator=model.accelerator,
        accelerator_fallback=model.accelerator_fallback,
        replica=replica,
        fast_schedulers=model.fast_schedulers,
        loras=[pb.ModelLora(name=name) for name in model.loras],
        sizes=[pb.Size(width_px=width, height_px=height) for width, height in offered_sizes(model, limits)],
        min_pixels=model.min_pixels,
        max_aspect_ratio=model.max_aspect_ratio if math.isfinite(model.max_aspect_ratio) else 0.0,
        scales_other_sizes=model.scales_other_sizes,
        prompt_syntaxes=[PROMPT_SYNTAXES.to_proto(each) for each in model.prompt_syntaxes],
        scheduler_details=[_scheduler(each) for each in model.scheduler_details],
        quantization=model.quantization,
        offload=model.offload,
    )


def _scheduler(info: SchedulerInfo) -> pb.Scheduler:
    return pb.Scheduler(
        name=info.name,
        aliases=info.aliases,
        sigmas=[SIGMAS.to_proto(each) for each in info.sigmas],
        spacings=[SPACINGS.to_proto(each) for each in info.spacings],
    )


def encode_status(code: str, reason: str, message: str) -> Status:
    """Returns a status with an `ErrorInfo`.

    Args:
        code: Name of the status code.
        reason: `ErrorInfo.reason`.
        message: For people.
    """
    status = Status(code=Code.Value(code), message=message)
    status.details.add().Pack(ErrorInfo(reason=reason, domain=DOMAIN))
    return status


def encode_error(error: ServiceError) -> Status:
    """Returns the status of a call that ends with `error`.

    It always has an `ErrorInfo`, a `BadRequest` with every violation, and a `RetryInfo` when the error has a delay.
    """
    details = [ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if isinstance(error, InvalidRequest):
        fields = [BadRequest.FieldViolation(field=v.field, description=v.description) for v in error.violations]
        details.append(BadRequest(field_violations=fields))
    if error.retry_after is not None:
        details.append(RetryInfo(retry_delay=_duration(error.retry_after)))
    status = Status(code=Code.Value(error.code), message=error.message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _describe_image(progress: pb.Progress, image: EncodedImage, kind: pb.ImageKind.ValueType, step: int) -> None:
    progress.image_format = IMAGE_FORMATS.to_proto(image.format)
    progress.image_kind = kind
    progress.image_step = step
    progress.width_px = image.width
    progress.height_px = image.height


def _timings(timings: Timings) -> pb.Timings:
    durations = {f.name: getattr(timings, f.name) for f in dataclasses.fields(timings) if f.name != "computed_steps"}
    return pb.Timings(
        **{name: _duration(seconds) for name, seconds in durations.items()}, computed_steps=timings.computed_steps
    )


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
