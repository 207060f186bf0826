"""From a request on the wire to a `Job`, or an error that names everything that is wrong with it."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import InvalidRequest, MethodUnavailable, Violation
from calotype_server.types import Job, OutputOptions, PreviewMethod, PreviewOptions, Priority

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import Limits, ModelInfo

__all__ = ["MAX_GUIDANCE_SCALE", "MAX_SEED", "validate"]

MAX_SEED = 2**53 - 1
"""Largest seed: every integer up to it is exact in JavaScript."""

MAX_GUIDANCE_SCALE = 100.0


MAX_EVERY_STEPS = 1000
MIN_PREVIEW_EDGE = 16
MAX_PREVIEW_INTERVAL = 60.0
"""Seconds."""

_METHODS = {
    pb.PREVIEW_METHOD_AUTO: PreviewMethod.AUTO,
    pb.PREVIEW_METHOD_HEAD: PreviewMethod.HEAD,
    pb.PREVIEW_METHOD_TINY_VAE: PreviewMethod.TINY_VAE,
    pb.PREVIEW_METHOD_FULL_VAE: PreviewMethod.FULL_VAE,
    pb.PREVIEW_METHOD_NONE: PreviewMethod.NONE,
}
_FORMATS: dict[int, Literal["jpeg", "png", "webp"]] = {
    pb.IMAGE_FORMAT_UNSPECIFIED: "png",
    pb.IMAGE_FORMAT_JPEG: "jpeg",
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_WEBP: "webp",
}
_PRIORITIES = {
    pb.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BATCH: Priority.BATCH,
}
_MAX_QUALITY = {"jpeg": 95, "webp": 100}


def validate(request: pb.GenerateRequest, model: ModelInfo, limits: Limits) -> Job:
    """Returns the job that `request` asks for, with the defaults filled in.

    Raises:
        InvalidRequest: With one violation for each thing that is wrong, in the order of the fields.
        MethodUnavailable: Nothing is wrong but the preview method, which this server has not, or does not allow.
    """
    violations: list[Violation] = []

    def refuse(field: str, description: str) -> None:
        violations.append(Violation(field, description))

    if not request.prompt.strip():
        refuse("prompt", "must not be empty")
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(request, field))
        if length > limits.max_prompt_chars:
            refuse(field, f"has {length} characters, at most {limits.max_prompt_chars} are accepted")
    if request.HasField("negative_prompt") and not model.takes_negative_prompt:
        refuse("negative_prompt", f"{model.pipeline} takes none")

    width = request.width_px if request.HasField("width_px") else model.width
    height = request.height_px if request.HasField("height_px") else model.height
    for field, size in (("width_px", width), ("height_px", height)):
        if size < model.size_multiple or size % model.size_multiple:
            refuse(field, f"is {size}, must be a positive multiple of {model.size_multiple}")
    if width > 0 and height > 0 and width * height > limits.max_pixels:
        refuse("width_px", f"times height_px is {width * height} pixels, at most {limits.max_pixels} are accepted")

    steps = request.step_count if request.HasField("step_count") else min(model.step_count, limits.max_step_count)
    if not 1 <= steps <= limits.max_step_count:
        refuse("step_count", f"is {steps}, must be 1 to {limits.max_step_count}")

    guidance = model.guidance_scale
    if request.HasField("guidance_scale"):
        guidance = request.guidance_scale
        if model.guidance_scale is None:
            refuse("guidance_scale", f"{model.pipeline} takes none")
        elif not (math.isfinite(guidance) and 0 <= guidance <= MAX_GUIDANCE_SCALE):
            refuse("guidance_scale", f"is {guidance:g}, must be 0 to {MAX_GUIDANCE_SCALE:g}")

    seed = request.seed if request.HasField("seed") else secrets.randbelow(2**32)
    if not 0 <= seed <= MAX_SEED:
        refuse("seed", f"is {seed}, must be 0 to {MAX_SEED}")

    scheduler = request.scheduler if request.HasField("scheduler") else model.scheduler
    if scheduler not in model.schedulers:
        refuse("scheduler", f"{scheduler[:80]!r} is unknown, must be one of {', '.join(model.schedulers)}")

    preview = _preview(request.preview, limits, refuse)
    output = _output(request.output, refuse)
    priority = _PRIORITIES.get(request.priority)
    if priority is None:
        refuse("priority", f"is {request.priority}, which is unknown")
    if violations or priority is None:
        raise InvalidRequest(violations)
    _check_method(preview.method, model, limits)
    negative = request.negative_prompt or None
    return Job(request.prompt, negative, width, height, steps, guidance, seed, scheduler, preview, output, priority)


def _preview(options: pb.PreviewOptions, limits: Limits, refuse: Callable[[str, str], None]) -> PreviewOptions:
    """Fills in the operator's defaults; tells `refuse` what is out of range."""
    chosen = limits.preview
    for field, attribute, least, most in (
        ("every_steps", "every_steps", 1, MAX_EVERY_STEPS),
        ("max_edge_px", "max_edge", MIN_PREVIEW_EDGE, limits.max_preview_edge),
        ("quality", "quality", 1, limits.max_preview_quality),
    ):
        if options.HasField(field):  # type: ignore[arg-type]
            value = getattr(options, field)
            if not least <= value <= most:
                refuse(f"preview.{field}", f"is {value}, must be {least} to {most}")
            chosen = replace(chosen, **{attribute: value})
    if options.HasField("min_interval"):
        interval = options.min_interval.seconds + options.min_interval.nanos / 1e9
        if not 0 <= interval <= MAX_PREVIEW_INTERVAL:
            refuse("preview.min_interval", f"is {interval:g} s, must be 0 to {MAX_PREVIEW_INTERVAL:g} s")
        chosen = replace(chosen, min_interval=interval)
    if options.method != pb.PREVIEW_METHOD_UNSPECIFIED:
        method = _METHODS.get(options.method)
        if method is None:
            refuse("preview.method", f"is {options.method}, which is unknown")
        else:
            chosen = replace(chosen, method=method)
    return chosen


def _output(options: pb.OutputOptions, refuse: Callable[[str, str], None]) -> OutputOptions:
    """Fills in defaults; tells `refuse` what is out of range."""
    name = _FORMATS.get(options.format)
    if name is None:
        refuse("output.format", f"is {options.format}, which is unknown")
        name = "webp"  # whose range of qualities is the widest
    chosen = OutputOptions(format=name, metadata=options.metadata if options.HasField("metadata") else True)
    if options.HasField("quality"):
        most = _MAX_QUALITY.get(name)
        if most is None:
            refuse("output.quality", f"{name.upper()} has none, it loses nothing")
        elif not 1 <= options.quality <= most:
            refuse("output.quality", f"is {options.quality}, must be 1 to {most}")
        chosen = replace(chosen, quality=options.quality)
    return chosen


def _check_method(method: PreviewMethod, model: ModelInfo, limits: Limits) -> None:
    if method in (PreviewMethod.AUTO, PreviewMethod.NONE):
        return
    metadata = {"method": method.name}
    if method not in limits.preview_methods:
        raise MethodUnavailable(f"This server does not allow previews by {method.name}.", metadata=metadata)
    if method in model.preview_methods:
        return
    why = f"There are no previews by {method.name} of this model."
    if method is PreviewMethod.TINY_VAE:
        why = "No tiny VAE is configured; the operator can name one that fits the model: calotype serve --tiny-vae ID."
    raise MethodUnavailable(why, metadata=metadata)
