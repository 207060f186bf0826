"""From a request on the wire to a `Job`, or an error that names everything that is wrong with it."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import InvalidRequest, PreviewMethodUnavailable, Violation
from calotype_server.types import (
    DeliveryOptions,
    DisconnectPolicy,
    Job,
    OutputOptions,
    PreviewMethod,
    PreviewOptions,
    Priority,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.types import Limits, ModelInfo

__all__ = [
    "MAX_GUIDANCE_SCALE",
    "MAX_SEED",
    "validate",
    "validate_id",
    "validate_page",
    "validate_watch",
    "watched_previews",
]

MAX_SEED = 2**53 - 1
"""Largest seed: every integer up to it is exact in JavaScript."""

MAX_GUIDANCE_SCALE = 100.0


MAX_EVERY_STEPS = 1000
MIN_PREVIEW_EDGE = 16
MAX_PREVIEW_INTERVAL = 60.0
"""Seconds."""

MAX_GRACE = 3600.0
"""Seconds."""

MAX_REQUEST_ID_CHARS = 128
DEFAULT_PAGE, MAX_PAGE = 50, 100
MAX_TOKEN_CHARS = 20

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
_POLICIES = {
    pb.DISCONNECT_POLICY_UNSPECIFIED: DisconnectPolicy.CANCEL,
    pb.DISCONNECT_POLICY_CANCEL: DisconnectPolicy.CANCEL,
    pb.DISCONNECT_POLICY_KEEP: DisconnectPolicy.KEEP,
}
_PRIORITIES = {
    pb.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BATCH: Priority.BATCH,
}
MAX_QUALITY = {"jpeg": 95, "webp": 100}
_MAX_EDGE = {"jpeg": 65500, "webp": 16383}
"""Of the formats, in pixels, as their encoders have it."""


def validate(
    request: pb.GenerateRequest, model: ModelInfo, limits: Limits, earlier: Sequence[Violation] = ()
) -> tuple[Job, DeliveryOptions]:
    """Returns the job and the terms that `request` asks for, with the defaults filled in.

    Args:
        request: What was asked for.
        model: What can be done.
        limits: What is allowed.
        earlier: What was found wrong when the request was decoded; of those fields nothing more is said.

    Raises:
        InvalidRequest: With one violation for each thing that is wrong, in the order of the fields.
        PreviewMethodUnavailable: Nothing is wrong but the preview method, which this server has not, or does not allow.
    """
    violations, refuse = _collector(earlier)
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

    scheduler = request.scheduler if request.HasField("scheduler") else model.scheduler
    most = model.max_steps(scheduler, limits)
    steps = request.step_count if request.HasField("step_count") else min(model.step_count, most)
    if not 1 <= steps <= most:
        refuse("step_count", f"is {steps}, must be 1 to {most}")

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

    if scheduler not in model.schedulers:
        refuse("scheduler", f"{scheduler[:80]!r} is unknown, must be one of {', '.join(model.schedulers)}")

    preview = _preview(request.preview, limits, limits.preview, refuse)
    output = _output(request.output, max(width, height), refuse)
    priority = _PRIORITIES.get(request.priority)
    if priority is None:
        refuse("priority", f"is {request.priority}, which is unknown")
    terms = _terms(request, refuse)
    if violations or priority is None:
        raise InvalidRequest(violations)
    _check_method(preview.method, model, limits)
    negative = request.negative_prompt or None
    job = Job(request.prompt, negative, width, height, steps, guidance, seed, scheduler, preview, output, priority)
    return job, replace(terms, seed_was_drawn=not request.HasField("seed"))


def validate_id(generation_id: str) -> None:
    """Refuses an id that is not one.

    Raises:
        InvalidRequest: It is empty.
    """
    if not generation_id:
        raise InvalidRequest([Violation("generation_id", "must not be empty")])


def validate_watch(request: pb.WatchRequest, limits: Limits, earlier: Sequence[Violation] = ()) -> None:
    """Refuses a request to watch that makes no sense, whatever it is that shall be watched; `earlier` as above.

    Raises:
        InvalidRequest: With all violations.
    """
    violations, refuse = _collector(earlier)
    if not request.generation_id:
        refuse("generation_id", "must not be empty")
    if request.after_sequence < 0:
        refuse("after_sequence", f"is {request.after_sequence}, must be 0 or more")
    _preview(request.preview, limits, limits.preview, refuse)
    if violations:
        raise InvalidRequest(violations)


def watched_previews(request: pb.WatchRequest, limits: Limits, job: Job) -> PreviewOptions | None:
    """Returns the previews that a validated request asks for where `job` is watched; None for those of the job."""
    if not request.HasField("preview"):
        return None
    return _preview(request.preview, limits, job.preview, lambda *_: None)


def validate_page(request: pb.ListGenerationsRequest, earlier: Sequence[Violation] = ()) -> tuple[int, int | None]:
    """Returns the size of a page, and the moment in nanoseconds before which it begins, None for the first.

    `earlier` is as above.

    Raises:
        InvalidRequest: With all violations.
    """
    violations, refuse = _collector(earlier)
    size = request.page_size if request.HasField("page_size") else DEFAULT_PAGE
    if not 1 <= size <= MAX_PAGE:
        refuse("page_size", f"is {size}, must be 1 to {MAX_PAGE}")
    token = request.page_token
    if token and not (token.isascii() and token.isdecimal() and len(token) < MAX_TOKEN_CHARS):
        refuse("page_token", "is not one that this server gave out")
    if violations:
        raise InvalidRequest(violations)
    return size, int(token) if token else None


def _collector(earlier: Sequence[Violation]) -> tuple[list[Violation], Callable[[str, str], None]]:
    """Returns a list that begins with `earlier`, and what adds to it, but not for the fields that it begins with."""
    violations = list(earlier)
    named = {violation.field for violation in earlier}

    def refuse(field: str, description: str) -> None:
        if field not in named:
            violations.append(Violation(field, description))

    return violations, refuse


def _terms(request: pb.GenerateRequest, refuse: Callable[[str, str], None]) -> DeliveryOptions:
    policy = _POLICIES.get(request.on_disconnect)
    if policy is None:
        refuse("on_disconnect", f"is {request.on_disconnect}, which is unknown")
    grace = request.disconnect_grace.seconds + request.disconnect_grace.nanos / 1e9
    if not 0 <= grace <= MAX_GRACE:
        refuse("disconnect_grace", f"is {grace:g} s, must be 0 to {MAX_GRACE:g} s")
    name = request.request_id
    if len(name) > MAX_REQUEST_ID_CHARS or not (name.isascii() and name.isprintable()):
        refuse("request_id", f"must be up to {MAX_REQUEST_ID_CHARS} characters of printable ASCII")
    return DeliveryOptions(on_disconnect=policy or DisconnectPolicy.CANCEL, grace=grace, request_id=name)


def _preview(
    options: pb.PreviewOptions, limits: Limits, base: PreviewOptions, refuse: Callable[[str, str], None]
) -> PreviewOptions:
    """Changes `base` as asked for; tells `refuse` what is out of range."""
    chosen = base
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


def _output(options: pb.OutputOptions, edge: int, refuse: Callable[[str, str], None]) -> OutputOptions:
    """Fills in defaults; tells `refuse` what is out of range."""
    name = _FORMATS.get(options.format)
    if name is None:
        refuse("output.format", f"is {options.format}, which is unknown")
        name = "webp"  # whose range of qualities is the widest
    elif edge > (longest := _MAX_EDGE.get(name, edge)):
        refuse("output.format", f"{name.upper()} holds edges up to {longest} px, this picture has one of {edge} px")
    chosen = OutputOptions(format=name, metadata=options.metadata if options.HasField("metadata") else True)
    if options.HasField("quality"):
        most = MAX_QUALITY.get(name)
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
        raise PreviewMethodUnavailable(f"This server does not allow previews by {method.name}.", metadata=metadata)
    if method in model.preview_methods:
        return
    why = f"There are no previews by {method.name} of this model."
    if method is PreviewMethod.TINY_VAE:
        why = "No tiny VAE is configured; the operator can name one that fits the model: calotype serve --tiny-vae ID."
    raise PreviewMethodUnavailable(why, metadata=metadata)
