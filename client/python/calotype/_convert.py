"""Converts messages to the public types. Accepts values that are newer than this client, such as an unknown phase."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, TypeVar

from ._image import Image
from ._options import PreviewMethod, Previews, PromptSyntax, Sigmas, TimestepSpacing
from ._types import GenerationSummary, Model, Notice, Phase, Progress, Scheduler, Size, Timings
from .v1 import calotype_pb2 as v1

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message

T = TypeVar("T")

__all__ = [
    "image_from_proto",
    "model_from_proto",
    "optional_seconds",
    "phase_from_proto",
    "progress_from_proto",
    "summary_from_proto",
    "wire_names",
]


def wire_names(enum: EnumDescriptor) -> dict[int, str]:
    """Maps the numbers of an enum to names without prefix, in lower case, such as "jpeg". Omits UNSPECIFIED."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {value.number: value.name.removeprefix(prefix).lower() for value in enum.values if value.number}


_PHASES = {number: Phase(name) for number, name in wire_names(v1.Phase.DESCRIPTOR).items()}
_METHODS = {number: PreviewMethod(name) for number, name in wire_names(v1.PreviewMethod.DESCRIPTOR).items()}
_FORMATS = wire_names(v1.ImageFormat.DESCRIPTOR)
_SYNTAXES = {number: PromptSyntax(name) for number, name in wire_names(v1.PromptSyntax.DESCRIPTOR).items()}
_SIGMAS = {number: Sigmas(name) for number, name in wire_names(v1.Sigmas.DESCRIPTOR).items()}
_SPACINGS = {number: TimestepSpacing(name) for number, name in wire_names(v1.TimestepSpacing.DESCRIPTOR).items()}


def phase_from_proto(phase: int) -> Phase:
    """Converts a phase. A phase that this client does not know becomes `Phase.UNKNOWN`."""
    return _PHASES.get(phase, Phase.UNKNOWN)


def _method_from_proto(method: int) -> PreviewMethod | None:
    return _METHODS.get(method, PreviewMethod.UNKNOWN) if method else None


def optional_seconds(message: Message, name: str) -> float | None:
    """Reads a Duration field in seconds. None when the field is unset."""
    if not message.HasField(name):
        return None
    duration: Duration = getattr(message, name)
    return duration.seconds + duration.nanos / 1e9


def image_from_proto(message: v1.Progress, data: bytes) -> Image:
    """Makes an image from `data`, with the format and size of a message."""
    return Image(data, _FORMATS.get(message.image_format, "unknown"), message.width_px, message.height_px)


def progress_from_proto(message: v1.Progress) -> Progress:
    """Converts a message. Leaves out the final image, which may consist of several messages."""
    predicted = message.image_kind == v1.IMAGE_KIND_PREDICTED and bool(message.image) and not message.previews_withdrawn
    return Progress(
        generation_id=message.generation_id,
        sequence=message.sequence,
        phase=phase_from_proto(message.phase),
        step=message.step,
        total_steps=message.total_steps,
        preview=image_from_proto(message, message.image) if predicted else None,
        preview_method=_method_from_proto(message.preview_method) if predicted else None,
        image_step=message.image_step,
        queue_position=message.queue_position,
        estimated_remaining=optional_seconds(message, "estimated_remaining"),
        previews_dropped=message.previews_dropped,
        previews_withdrawn=message.previews_withdrawn,
        seed=message.seed,
        warnings=tuple(Notice(warning.reason, warning.message) for warning in message.warnings),
        timings=_timings_from_proto(message.timings) if message.HasField("timings") else None,
        finished_early=message.finished_early,
        not_persisted=message.not_persisted,
    )


def _timings_from_proto(timings: v1.Timings) -> Timings:
    return Timings(
        queued=optional_seconds(timings, "queued"),
        encoding_prompt=optional_seconds(timings, "encoding_prompt"),
        denoising=optional_seconds(timings, "denoising"),
        decoding=optional_seconds(timings, "decoding"),
        first_preview=optional_seconds(timings, "first_preview"),
        total=optional_seconds(timings, "total"),
        computed_steps=timings.computed_steps,
    )


def summary_from_proto(summary: v1.GenerationSummary) -> GenerationSummary:
    """Converts an entry of the list of generations."""
    return GenerationSummary(
        generation_id=summary.generation_id,
        request_id=summary.request_id,
        prompt=summary.prompt,
        phase=phase_from_proto(summary.phase),
        step=summary.step,
        total_steps=summary.total_steps,
        seed=summary.seed,
        create_time=summary.create_time.ToDatetime(UTC),
        group=summary.group,
    )


def model_from_proto(model: v1.Model) -> Model:
    """Converts the description of a model."""
    return Model(
        name=model.name,
        pipeline=model.pipeline,
        width=model.width_px,
        height=model.height_px,
        size_multiple=model.size_multiple_px,
        max_pixels=model.max_pixels,
        sizes=tuple(Size(size.width_px, size.height_px) for size in model.sizes),
        min_pixels=model.min_pixels,
        max_aspect_ratio=model.max_aspect_ratio or None,
        scales_other_sizes=model.scales_other_sizes,
        steps=model.step_count,
        max_steps=model.max_step_count,
        guidance_scale=model.guidance_scale if model.HasField("guidance_scale") else None,
        takes_negative_prompt=model.takes_negative_prompt,
        scheduler=model.scheduler,
        schedulers=tuple(model.schedulers),
        scheduler_details=tuple(map(_scheduler_from_proto, model.scheduler_details)),
        fast_schedulers=tuple(model.fast_schedulers),
        loras=tuple(lora.name for lora in model.loras),
        prompt_syntaxes=_known(_SYNTAXES, model.prompt_syntaxes),
        max_prompt_chars=model.max_prompt_chars,
        max_prompt_tokens=model.max_prompt_tokens,
        preview_methods=tuple(_METHODS.get(method, PreviewMethod.UNKNOWN) for method in model.preview_methods),
        previews=_previews_from_proto(model.preview),
        max_preview_edge=model.max_preview_edge_px,
        max_preview_quality=model.max_preview_quality,
        max_active=model.max_active,
        max_batch_rows=model.max_batch_rows,
        unbatched_reason=model.unbatched_reason,
        accelerator=model.accelerator,
        accelerator_fallback=model.accelerator_fallback,
        replica=model.replica,
        device=model.device,
        dtype=model.dtype,
        quantization=model.quantization,
        offload=model.offload,
        server_version=model.server_version,
    )


def _scheduler_from_proto(scheduler: v1.Scheduler) -> Scheduler:
    return Scheduler(
        name=scheduler.name,
        aliases=tuple(scheduler.aliases),
        sigmas=_known(_SIGMAS, scheduler.sigmas),
        spacings=_known(_SPACINGS, scheduler.spacings),
    )


def _known(values: Mapping[int, T], numbers: Iterable[int]) -> tuple[T, ...]:
    """Converts numbers of an enum. Leaves out those that this client does not know, because it cannot send them."""
    return tuple(values[number] for number in numbers if number in values)


def _previews_from_proto(options: v1.PreviewOptions) -> Previews:
    return Previews(
        every_steps=options.every_steps if options.HasField("every_steps") else None,
        min_interval=optional_seconds(options, "min_interval"),
        max_edge=options.max_edge_px if options.HasField("max_edge_px") else None,
        quality=options.quality if options.HasField("quality") else None,
        method=_method_from_proto(options.method),
    )
