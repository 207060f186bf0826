"""Decides whether a stored generation may run again after a restart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from calotype_server import errors
from calotype_server.types import Speed

if TYPE_CHECKING:
    from calotype_server.generations.index import StoredGeneration
    from calotype_server.limits import Limits
    from calotype_server.types import Job, ModelInfo

__all__ = ["MAX_ATTEMPTS", "reason_not_to_run"]

MAX_ATTEMPTS: Final = 2
"""Attempts without an end, after which a generation is taken for the cause of the crashes."""


def reason_not_to_run(stored: StoredGeneration, model: ModelInfo, limits: Limits) -> errors.ServiceError | None:
    """Returns the error that a generation without an end must end with; None if it may run.

    Args:
        stored: The stored generation.
        model: The model of this process, which may not be the one that the request was checked for.
        limits: The limits of this process.
    """
    record = stored.record
    if stored.replaced:
        # It was abandoned, but the process ended before that was stored.
        return errors.Abandoned("The caller disconnected, and then repeated its request.")
    if record.attempts >= MAX_ATTEMPTS:
        return errors.EngineCrashed(
            f"The server stopped unexpectedly on each of {record.attempts} attempts, so it does not try again."
        )
    violations = _violations(record.job, model, limits)
    return errors.InvalidRequest(violations) if violations else None


def _violations(job: Job, model: ModelInfo, limits: Limits) -> list[errors.Violation]:
    """Returns the reasons why the engine cannot, or must not, draw the image."""
    found = []
    for field, size in (("width_px", job.width), ("height_px", job.height)):
        if size % model.size_multiple:
            found.append((field, f"is {size}, must be a positive multiple of {model.size_multiple}"))
    pixels, maximum = job.pixel_count, limits.max_pixels
    if job.output.size is not None and pixels <= maximum:
        pixels, maximum = math.prod(job.output.size), limits.max_output_pixels
    if pixels > maximum:
        found.append(("width_px", f"times height_px is {pixels} pixels, the maximum is {maximum}"))
    elif not found and not model.supports_size(job.width, job.height):
        found.append(("width_px", f"{job.width}x{job.height} is not a size that the model supports"))
    info = model.scheduler_info(job.scheduler)
    if info is None:
        found.append(("scheduler", f"{job.scheduler!r} is unknown, must be one of {', '.join(model.schedulers)}"))
    elif job.step_count > (maximum := model.max_steps(job.scheduler, limits.max_step_count)):
        found.append(("step_count", f"is {job.step_count}, must be 1 to {maximum}"))
    elif job.sigmas is not None and job.sigmas not in info.sigmas:
        found.append(("sigmas", f"is {job.sigmas.name}, which {job.scheduler} does not support"))
    elif job.spacing is not None and job.spacing not in info.spacings:
        found.append(("spacing", f"is {job.spacing.name}, which {job.scheduler} does not support"))
    elif job.speed is Speed.FAST and job.scheduler not in model.fast_schedulers:
        found.append(("speed", f"is FAST, which {job.scheduler} does not offer"))
    for number, lora in enumerate(job.loras):
        if lora.name not in model.loras:
            known = f", must be one of {', '.join(model.loras)}" if model.loras else ""
            found.append((f"loras.{number}.name", f"{lora.name!r} is unknown{known}"))
    return [errors.Violation(field, f"{text}, since the server restarted") for field, text in found]
