"""Finds the schedulers whose steps can be forecast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.engine.schedulers.names import read_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calotype_server.types import SchedulerInfo

__all__ = ["fast_schedulers"]

_SMOOTH = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "PNDMScheduler",
)
"""Schedulers that evaluate the model once a step, along a smooth path. Ancestral samplers, DDPM and consistency models
add fresh noise at every step, and solvers of two stages evaluate the model twice. DEIS and UniPC are not listed:
with them, images with fewer steps were measured to be as close as fast images."""


def fast_schedulers(pipeline: Any, details: Iterable[SchedulerInfo]) -> tuple[str, ...]:
    """Returns the schedulers and aliases that `Speed.FAST` works with, sorted.

    Args:
        pipeline: The pipeline.
        details: Its schedulers.
    """
    candidates = [name for info in details if info.name in _SMOOTH for name in (info.name, *info.aliases)]
    return tuple(sorted(name for name in candidates if not _adds_noise(pipeline, name)))


def _adds_noise(pipeline: Any, name: str) -> bool:
    """Whether a scheduler adds noise at every step, because of its config or its alias."""
    alias = read_name(name)
    config = make_scheduler(pipeline, name if alias is None else alias.scheduler).config
    return bool(config.get("stochastic_sampling")) or str(config.get("algorithm_type")).startswith("sde-")
