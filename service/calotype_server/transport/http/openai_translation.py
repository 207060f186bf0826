"""Translates requests of OpenAI's images API to Calotype's, and names back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.enums import IMAGE_FORMATS, PROMPT_SYNTAXES, SIGMAS, SPACINGS, SPEEDS
from calotype_server.errors import InvalidRequest, Violation
from calotype_server.limits import JPEG_QUALITY_MAX, PREVIEW_EVERY_STEPS_MAX, WEBP_QUALITY_MAX
from calotype_server.transport.http.openai_models import ImageWarning
from calotype_server.types import PromptSyntax, Sigmas, Speed, TimestepSpacing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calotype_server.transport.http.openai_models import FileFormat, ImagesRequest, Quality

__all__ = [
    "WARNINGS_HEADER",
    "conflicts",
    "file_format",
    "image_warnings",
    "quality_of",
    "to_generate_request",
    "warning_headers",
    "with_openai_names",
]

_STEP_FACTORS = {"low": 0.5, "medium": 1.0, "high": 2.0, "xhigh": 3.0, "max": 4.0}

_OLDER_QUALITIES: dict[str, Quality] = {"auto": "medium", "standard": "medium", "hd": "high"}

_OPENAI_NAMES = {
    "width_px": "size",
    "height_px": "size",
    "output.quality": "output_compression",
    "image_count": "n",
}
"""OpenAI's names of the proto's fields, where they differ."""


WARNINGS_HEADER: Final = "calotype-warnings"
"""Response header with the reasons of all warnings, separated by commas, for clients that only read known fields."""


def conflicts(request: ImagesRequest, model: pb.Model) -> list[Violation]:
    """Returns the violations that concern several fields, or the loaded model."""
    found = []
    if request.model is not None and request.model != model.name:
        found.append(Violation("model", f"must be {model.name!r}, the only loaded model"))
    if request.stream and request.n > 1:
        found.append(Violation("n", "must be 1 with stream"))
    if request.partial_images and not request.stream:
        found.append(Violation("partial_images", "needs stream"))
    if request.stream and request.response_format == "url":
        found.append(Violation("response_format", "must be b64_json with stream"))
    return found


def to_generate_request(request: ImagesRequest, model: pb.Model, index: int) -> pb.GenerateRequest:
    """Returns the request for one image.

    Args:
        request: As received.
        model: The loaded model, whose default number of steps `quality` scales.
        index: Of the image, from 0; added to the seed.
    """
    output = pb.OutputOptions(format=IMAGE_FORMATS.to_proto(request.output_format))
    speed = SPEEDS.to_proto(Speed[request.speed.upper()])
    syntax = PROMPT_SYNTAXES.to_proto(PromptSyntax[request.prompt_syntax.upper()])
    translated = pb.GenerateRequest(prompt=request.prompt, output=output, speed=speed, prompt_syntax=syntax)
    for name in ("negative_prompt", "step_count", "guidance_scale", "scheduler"):
        if (value := getattr(request, name)) is not None:
            setattr(translated, name, value)
    if request.sigmas is not None:
        translated.sigmas = SIGMAS.to_proto(Sigmas[request.sigmas.upper()])
    if request.spacing is not None:
        translated.spacing = SPACINGS.to_proto(TimestepSpacing[request.spacing.upper()])
    for lora in request.loras:
        translated.loras.add(name=lora.name, scale=lora.scale)
    if request.seed is not None:
        # -1 is a random seed, and other negative numbers are invalid.
        translated.seed = request.seed + (index if request.seed >= 0 else 0)
    if request.size != "auto":
        translated.width_px, translated.height_px = map(int, request.size.split("x"))
    if request.output_compression is not None:
        largest = JPEG_QUALITY_MAX if request.output_format == "jpeg" else WEBP_QUALITY_MAX
        translated.output.quality = max(1, min(request.output_compression, largest))
    if request.step_count is None:
        steps = int(model.step_count * _STEP_FACTORS[quality_of(request)])
        translated.step_count = max(1, min(steps, model.max_step_count))
    if request.stream and request.partial_images:
        # Spreads the previews evenly; the last of these positions is the final image.
        every_steps = max(1, translated.step_count // (request.partial_images + 1))
        translated.preview.every_steps = min(every_steps, PREVIEW_EVERY_STEPS_MAX)
    else:
        translated.preview.method = pb.PREVIEW_METHOD_NONE
    return translated


def quality_of(request: ImagesRequest) -> Quality:
    """Returns the quality, with OpenAI's older names and "auto" replaced."""
    return cast("Quality", _OLDER_QUALITIES.get(request.quality, request.quality))


def file_format(message: pb.Progress) -> FileFormat:
    """Returns the format of a message's image."""
    return IMAGE_FORMATS.from_proto(message.image_format) or "png"


def with_openai_names(error: InvalidRequest) -> InvalidRequest:
    """Returns the error with OpenAI's names for the fields."""
    return InvalidRequest([Violation(_OPENAI_NAMES.get(v.field, v.field), v.description) for v in error.violations])


def image_warnings(messages: Iterable[pb.Progress]) -> list[ImageWarning]:
    """Returns the warnings in the last messages of generations, each once."""
    found = [(warning.reason, warning.message) for message in messages for warning in message.warnings]
    return [ImageWarning(reason=reason, message=message) for reason, message in dict.fromkeys(found)]


def warning_headers(warnings: Iterable[ImageWarning]) -> dict[str, str]:
    """Returns the response header for warnings; none if there are no warnings."""
    reasons = dict.fromkeys(warning.reason for warning in warnings)
    return {WARNINGS_HEADER: ", ".join(reasons)} if reasons else {}
