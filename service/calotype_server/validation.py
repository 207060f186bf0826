"""From a request on the wire to a `Job`, or an error that names everything that is wrong with it."""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING

from calotype_server.errors import InvalidRequest, Violation
from calotype_server.types import Job

if TYPE_CHECKING:
    from calotype.v1.calotype_pb2 import GenerateRequest
    from calotype_server.types import Limits, ModelInfo

__all__ = ["MAX_GUIDANCE_SCALE", "MAX_SEED", "validate"]

MAX_SEED = 2**53 - 1
"""Largest seed: every integer up to it is exact in JavaScript."""

MAX_GUIDANCE_SCALE = 100.0


def validate(request: GenerateRequest, model: ModelInfo, limits: Limits) -> Job:
    """Returns the job that `request` asks for, with the model's defaults filled in.

    Raises:
        InvalidRequest: With one violation for each thing that is wrong, in the order of the fields.
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

    if violations:
        raise InvalidRequest(violations)
    negative = request.negative_prompt or None
    return Job(request.prompt, negative, width, height, steps, guidance, seed, scheduler)
