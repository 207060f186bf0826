"""Wire messages → what people hold. Accepts anything a server may send, also values that are newer than this client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._types import Image, Model, Notice, Phase, Progress, Timings
from .v1 import calotype_pb2 as v1

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message

__all__ = ["image_from_proto", "model_from_proto", "optional_seconds", "phase_from_proto", "progress_from_proto"]

_PHASES: dict[int, Phase] = {
    value: Phase(name.removeprefix("PHASE_").lower()) for name, value in v1.Phase.items() if value
}
_FORMATS: dict[int, str] = {
    value: name.removeprefix("IMAGE_FORMAT_").lower() for name, value in v1.ImageFormat.items() if value
}


def phase_from_proto(phase: int) -> Phase:
    """Reads a phase."""
    return _PHASES.get(phase, Phase.UNKNOWN)


def optional_seconds(message: Message, name: str) -> float | None:
    """Reads an optional Duration field in seconds."""
    if not message.HasField(name):
        return None
    duration: Duration = getattr(message, name)
    return duration.seconds + duration.nanos / 1e9


def image_from_proto(message: v1.Progress, data: bytes) -> Image:
    """Makes an image of `data` with the description in a message."""
    return Image(data, _FORMATS.get(message.image_format, "unknown"), message.width_px, message.height_px)


def progress_from_proto(message: v1.Progress) -> Progress:
    """Reads a message, without the final image."""
    predicted = message.image_kind == v1.IMAGE_KIND_PREDICTED and bool(message.image)
    return Progress(
        generation_id=message.generation_id,
        sequence=message.sequence,
        phase=phase_from_proto(message.phase),
        step=message.step,
        total_steps=message.total_steps,
        preview=image_from_proto(message, message.image) if predicted else None,
        image_step=message.image_step,
        queue_position=message.queue_position,
        estimated_remaining=optional_seconds(message, "estimated_remaining"),
        previews_dropped=message.previews_dropped,
        seed=message.seed,
        warnings=tuple(Notice(warning.reason, warning.message) for warning in message.warnings),
        timings=_timings_from_proto(message.timings) if message.HasField("timings") else None,
    )


def _timings_from_proto(timings: v1.Timings) -> Timings:
    return Timings(**{field.name: optional_seconds(timings, field.name) for field in timings.DESCRIPTOR.fields})


def model_from_proto(model: v1.Model) -> Model:
    """Reads the description of a model."""
    return Model(
        name=model.name,
        pipeline=model.pipeline,
        width=model.width_px,
        height=model.height_px,
        size_multiple=model.size_multiple_px,
        max_pixels=model.max_pixels,
        steps=model.step_count,
        max_steps=model.max_step_count,
        guidance_scale=model.guidance_scale if model.HasField("guidance_scale") else None,
        takes_negative_prompt=model.takes_negative_prompt,
        scheduler=model.scheduler,
        schedulers=tuple(model.schedulers),
        max_prompt_chars=model.max_prompt_chars,
        max_prompt_tokens=model.max_prompt_tokens,
        device=model.device,
        dtype=model.dtype,
        server_version=model.server_version,
    )
