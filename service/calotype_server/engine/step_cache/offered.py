"""Finds the schedulers whose steps can be forecast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.engine.schedulers.make import make_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterable

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


def fast_schedulers(pipeline: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Returns the schedulers among `names` that `Speed.FAST` works with, in the same order."""
    return tuple(name for name in names if name in _SMOOTH and not _adds_noise(make_scheduler(pipeline, name)))


def _adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler is configured to add noise at every step."""
    config = scheduler.config
    return bool(config.get("stochastic_sampling")) or str(config.get("algorithm_type")).startswith("sde-")
