"""Checks the guidance scale and the negative prompt of a request: those without an effect are rejected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from calotype_server.limits import GUIDANCE_SCALE_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype.v1 import calotype_pb2 as pb
    from calotype_server.types import ModelInfo

__all__ = ["check_negative_prompt", "guidance_scale"]


def guidance_scale(request: pb.GenerateRequest, model: ModelInfo, reject: Callable[[str, str], None]) -> float | None:
    """Returns the guidance scale of the request, or the model's default; rejects values out of range."""
    if not request.HasField("guidance_scale"):
        return model.guidance_scale
    guidance = request.guidance_scale
    if model.guidance_scale is None:
        reject("guidance_scale", f"is not supported by {model.pipeline}")
    elif not (math.isfinite(guidance) and 0 <= guidance <= GUIDANCE_SCALE_MAX):
        reject("guidance_scale", f"is {guidance:g}, must be 0 to {GUIDANCE_SCALE_MAX:g}")
    return guidance


def check_negative_prompt(request: pb.GenerateRequest, model: ModelInfo, reject: Callable[[str, str], None]) -> None:
    """Rejects a negative prompt that the model ignores, because of its kind or because of the guidance scale."""
    if not request.HasField("negative_prompt"):
        return
    if not model.takes_negative_prompt:
        reject("negative_prompt", f"is not supported by {model.pipeline}")
    if not request.negative_prompt or model.negative_prompt_above is None:
        return
    guidance = request.guidance_scale if request.HasField("guidance_scale") else model.guidance_scale
    if guidance is not None and guidance <= model.negative_prompt_above:
        reject(
            "negative_prompt",
            f"has no effect with guidance_scale {guidance:g}, which must be above {model.negative_prompt_above:g}",
        )
