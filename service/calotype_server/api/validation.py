"""Converts requests to jobs, or raises an error that lists every violation."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.enums import DISCONNECT_POLICIES, IMAGE_FORMATS, PREVIEW_METHODS, PRIORITIES, SPEEDS
from calotype_server.api.groups import check_group
from calotype_server.api.guidance import check_negative_prompt, guidance_scale
from calotype_server.api.loras import chosen_loras
from calotype_server.api.prompt_syntax import prompt_syntax
from calotype_server.api.schedulers import chosen_options, chosen_scheduler
from calotype_server.api.sizes import choose_size
from calotype_server.errors import InvalidRequest, PreviewMethodUnavailable, Violation
from calotype_server.limits import (
    GRACE_SECONDS_MAX,
    JPEG_QUALITY_MAX,
    PAGE_SIZE_DEFAULT,
    PAGE_SIZE_MAX,
    PREVIEW_EDGE_MIN,
    PREVIEW_EVERY_STEPS_MAX,
    PREVIEW_INTERVAL_MAX,
    RANDOM_SEED,
    REQUEST_ID_CHARS_MAX,
    SEED_MAX,
    WEBP_QUALITY_MAX,
)
from calotype_server.types import (
    FAST_MIN_STEPS,
    DeliveryOptions,
    DisconnectPolicy,
    Job,
    OutputOptions,
    PreviewMethod,
    PreviewOptions,
    Speed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.limits import Limits
    from calotype_server.types import ModelInfo

__all__ = ["validate", "validate_id", "validate_page", "validate_watch", "watched_previews"]

_SEED_BITS = 32
"""Size of the seeds that the server draws."""

_PAGE_TOKEN_CHARS_MAX = 19
"""Digits of the largest time in nanoseconds that fits into 63 bits."""

_QUALITY_MAX = {"jpeg": JPEG_QUALITY_MAX, "webp": WEBP_QUALITY_MAX}
_EDGE_MAX = {"jpeg": 65500, "webp": 16383}
"""Pixels per side that the encoders of these formats support."""

Reject: TypeAlias = "Callable[[str, str], None]"
"""Adds a violation: the name of the field and a description."""


def validate(
    request: pb.GenerateRequest, model: ModelInfo, limits: Limits, earlier: Sequence[Violation] = ()
) -> tuple[Job, DeliveryOptions]:
    """Returns the job and the delivery options of `request`, with defaults filled in.

    Args:
        request: The request of the caller.
        model: Abilities and defaults of the model.
        limits: Limits and preview defaults of the operator.
        earlier: Violations found while decoding the request. Their fields get no further violations.

    Raises:
        InvalidRequest: At least one field is invalid. Lists all violations: the earlier ones, and then the others in
            the order of the proto's fields.
        PreviewMethodUnavailable: The request is valid, but the server does not have or does not allow its preview
            method.
    """
    violations, reject = _collector(earlier)
    _check_prompts(request, model, limits, reject)
    (width, height), scaled = choose_size(request, model, limits, reject)
    scheduler = chosen_scheduler(request, model, reject)
    steps = _step_count(request, model, model.max_steps(scheduler.scheduler, limits.max_step_count), reject)
    guidance = guidance_scale(request, model, reject)
    draws_seed = not request.HasField("seed") or request.seed == RANDOM_SEED
    seed = secrets.randbelow(2**_SEED_BITS) if draws_seed else request.seed
    if not 0 <= seed <= SEED_MAX:
        reject("seed", f"is {seed}, must be 0 to {SEED_MAX}, or {RANDOM_SEED} for a random one")
    preview = _preview(request.preview, limits, limits.preview, reject)
    output = replace(_output(request.output, max(scaled or (width, height)), reject), size=scaled)
    priority = PRIORITIES.from_proto(request.priority)
    if priority is None:
        reject("priority", f"has the unknown value {request.priority}")
    delivery = _delivery(request, reject)
    speed = _speed(request, model, scheduler.scheduler, steps, reject)
    loras = chosen_loras(request, model, reject)
    syntax = prompt_syntax(request, model, reject)
    sigmas, spacing = chosen_options(request, model, scheduler, reject)
    check_group(request.group, reject)
    if violations or priority is None:
        raise InvalidRequest([*earlier, *sorted(violations[len(earlier) :], key=_field_number)])
    _check_method(preview.method, model, limits)
    negative = request.negative_prompt or None
    job = Job(
        request.prompt,
        negative,
        width,
        height,
        steps,
        guidance,
        seed,
        scheduler.scheduler,
        preview,
        output,
        priority,
        speed,
        loras=loras,
        prompt_syntax=syntax,
        sigmas=sigmas,
        spacing=spacing,
    )
    return job, replace(delivery, seed_was_drawn=draws_seed)


def _field_number(violation: Violation) -> int:
    """Returns the number of a violation's field in `GenerateRequest`."""
    return pb.GenerateRequest.DESCRIPTOR.fields_by_name[violation.field.partition(".")[0]].number


def validate_id(generation_id: str) -> None:
    """Checks the id in a request to cancel or finish.

    Raises:
        InvalidRequest: The id is empty.
    """
    if not generation_id:
        raise InvalidRequest([Violation("generation_id", "must not be empty")])


def validate_watch(request: pb.WatchRequest, limits: Limits, earlier: Sequence[Violation] = ()) -> None:
    """Checks a request to watch, before the generation is looked up; `earlier` as for `validate`.

    Raises:
        InvalidRequest: At least one field is invalid. Lists all violations.
    """
    violations, reject = _collector(earlier)
    if not request.generation_id:
        reject("generation_id", "must not be empty")
    if request.after_sequence < 0:
        reject("after_sequence", f"is {request.after_sequence}, must be 0 or more")
    _preview(request.preview, limits, limits.preview, reject)
    if violations:
        raise InvalidRequest(violations)


def watched_previews(request: pb.WatchRequest, limits: Limits, job: Job) -> PreviewOptions | None:
    """Returns the preview options of a validated request to watch `job`; None to use the options of the job."""
    if not request.HasField("preview"):
        return None
    return _preview(request.preview, limits, job.preview, lambda *_: None)


def validate_page(request: pb.ListGenerationsRequest, earlier: Sequence[Violation] = ()) -> tuple[int, int | None]:
    """Returns the size of the page and where it starts.

    Args:
        request: The request of the caller.
        earlier: As for `validate`.

    Returns:
        The size, and a Unix time in nanoseconds: the page starts with the newest generation created before it. None for
        the first page.

    Raises:
        InvalidRequest: At least one field is invalid. Lists all violations.
    """
    violations, reject = _collector(earlier)
    size = request.page_size if request.HasField("page_size") else PAGE_SIZE_DEFAULT
    if not 1 <= size <= PAGE_SIZE_MAX:
        reject("page_size", f"is {size}, must be 1 to {PAGE_SIZE_MAX}")
    token = request.page_token
    if token and not (token.isascii() and token.isdecimal() and len(token) <= _PAGE_TOKEN_CHARS_MAX):
        reject("page_token", "is not a token of this server")
    if violations:
        raise InvalidRequest(violations)
    return size, int(token) if token else None


def _collector(earlier: Sequence[Violation]) -> tuple[list[Violation], Reject]:
    """Returns a list that starts with `earlier`, and a function that adds violations of other fields to it."""
    violations = list(earlier)
    named = {violation.field for violation in earlier}

    def reject(field: str, description: str) -> None:
        if field not in named:
            violations.append(Violation(field, description))

    return violations, reject


def _check_prompts(request: pb.GenerateRequest, model: ModelInfo, limits: Limits, reject: Reject) -> None:
    if not request.prompt.strip():
        reject("prompt", "must not be empty")
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(request, field))
        if length > limits.max_prompt_chars:
            reject(field, f"has {length} characters, the maximum is {limits.max_prompt_chars}")
    check_negative_prompt(request, model, reject)


def _step_count(request: pb.GenerateRequest, model: ModelInfo, maximum: int, reject: Reject) -> int:
    steps = request.step_count if request.HasField("step_count") else min(model.step_count, maximum)
    if not 1 <= steps <= maximum:
        reject("step_count", f"is {steps}, must be 1 to {maximum}")
    return steps


def _speed(request: pb.GenerateRequest, model: ModelInfo, scheduler: str, steps: int, reject: Reject) -> Speed:
    """Returns the speed; rejects FAST where it has no effect."""
    speed = SPEEDS.from_proto(request.speed)
    if speed is None:
        reject("speed", f"has the unknown value {request.speed}")
    elif speed is Speed.FAST:
        if not model.fast_schedulers:
            reject("speed", "is FAST, which this server does not offer")
        elif model.scheduler_info(scheduler) is not None and scheduler not in model.fast_schedulers:
            reject("speed", f"is FAST, which needs one of the schedulers {', '.join(model.fast_schedulers)}")
        elif steps < FAST_MIN_STEPS:
            reject("speed", f"is FAST, which needs at least {FAST_MIN_STEPS} steps")
    return speed or Speed.EXACT


def _delivery(request: pb.GenerateRequest, reject: Reject) -> DeliveryOptions:
    policy = DISCONNECT_POLICIES.from_proto(request.on_disconnect)
    if policy is None:
        reject("on_disconnect", f"has the unknown value {request.on_disconnect}")
    grace = request.disconnect_grace.seconds + request.disconnect_grace.nanos / 1e9
    if not 0 <= grace <= GRACE_SECONDS_MAX:
        reject("disconnect_grace", f"is {grace:g} s, must be 0 to {GRACE_SECONDS_MAX:g} s")
    name = request.request_id
    if len(name) > REQUEST_ID_CHARS_MAX or not (name.isascii() and name.isprintable()):
        reject("request_id", f"must be up to {REQUEST_ID_CHARS_MAX} characters of printable ASCII")
    return DeliveryOptions(
        on_disconnect=policy or DisconnectPolicy.CANCEL, grace=grace, request_id=name, group=request.group
    )


def _preview(options: pb.PreviewOptions, limits: Limits, base: PreviewOptions, reject: Reject) -> PreviewOptions:
    """Returns `base` with the options that the request sets; rejects values out of range."""
    chosen = base
    for field, attribute, minimum, maximum in (
        ("every_steps", "every_steps", 1, PREVIEW_EVERY_STEPS_MAX),
        ("max_edge_px", "max_edge", PREVIEW_EDGE_MIN, limits.max_preview_edge),
        ("quality", "quality", 1, limits.max_preview_quality),
    ):
        if options.HasField(field):  # type: ignore[arg-type]
            value = getattr(options, field)
            if not minimum <= value <= maximum:
                reject(f"preview.{field}", f"is {value}, must be {minimum} to {maximum}")
            chosen = replace(chosen, **{attribute: value})
    if options.HasField("min_interval"):
        interval = options.min_interval.seconds + options.min_interval.nanos / 1e9
        if not 0 <= interval <= PREVIEW_INTERVAL_MAX:
            reject("preview.min_interval", f"is {interval:g} s, must be 0 to {PREVIEW_INTERVAL_MAX:g} s")
        chosen = replace(chosen, min_interval=interval)
    if options.method != pb.PREVIEW_METHOD_UNSPECIFIED:
        method = PREVIEW_METHODS.from_proto(options.method)
        if method is None:
            reject("preview.method", f"has the unknown value {options.method}")
        else:
            chosen = replace(chosen, method=method)
    return chosen


def _output(options: pb.OutputOptions, edge: int, reject: Reject) -> OutputOptions:
    """Returns the output options of an image whose longer edge has `edge` pixels; rejects values out of range."""
    name = IMAGE_FORMATS.from_proto(options.format)
    if name is None:
        reject("output.format", f"has the unknown value {options.format}")
        name = "webp"  # It accepts the widest range of qualities, so that quality is not rejected as well.
    elif edge > (longest := _EDGE_MAX.get(name, edge)):
        reject("output.format", f"{name.upper()} supports at most {longest} px per side, this image has {edge} px")
    chosen = OutputOptions(format=name, metadata=options.metadata if options.HasField("metadata") else True)
    if options.HasField("quality"):
        maximum = _QUALITY_MAX.get(name)
        if maximum is None:
            reject("output.quality", f"does not apply to {name.upper()}, which is lossless")
        elif not 1 <= options.quality <= maximum:
            reject("output.quality", f"is {options.quality}, must be 1 to {maximum}")
        chosen = replace(chosen, quality=options.quality)
    return chosen


def _check_method(method: PreviewMethod, model: ModelInfo, limits: Limits) -> None:
    """Raises `PreviewMethodUnavailable` unless the server has and allows the method."""
    if method in (PreviewMethod.AUTO, PreviewMethod.NONE):
        return
    metadata = {"method": method.name}
    if method not in limits.preview_methods:
        raise PreviewMethodUnavailable(f"This server does not allow {method.name} previews.", metadata=metadata)
    if method in model.preview_methods:
        return
    message = f"This model has no {method.name} previews."
    if method is PreviewMethod.TINY_VAE:
        message = "This server has no tiny VAE. The operator can configure one: calotype serve --tiny-vae ID."
    raise PreviewMethodUnavailable(message, metadata=metadata)
