"""Finds the schedulers that a pipeline can use, and their limits."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.engine.schedulers.predicted_x0 import noise_level

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["compatible_schedulers", "max_step_counts", "prediction_kind"]


def compatible_schedulers(pipeline: Any) -> tuple[str, ...]:
    """Returns the compatible schedulers that can step with this model's config and expect the same kind of prediction.

    The list of diffusers is too long: some need a package that is not installed, some expect another prediction.
    """
    own = type(pipeline.scheduler).__name__
    kind = prediction_kind(pipeline, own)
    names = {own}
    for compatible in getattr(pipeline.scheduler, "compatibles", []):
        name = compatible.__name__
        if hasattr(diffusers, name) and kind is not None and prediction_kind(pipeline, name) == kind:
            names.add(name)
    return tuple(sorted(names))


def max_step_counts(pipeline: Any, names: Iterable[str]) -> dict[str, int]:
    """Returns the most steps of schedulers that have a limit: the timesteps they were trained on, or fewer."""
    found = {}
    for name in names:
        scheduler = make_scheduler(pipeline, name)
        for key in ("num_train_timesteps", "original_inference_steps"):
            count = scheduler.config.get(key)
            # Some need more arguments than a number of steps, and accept any number.
            with contextlib.suppress(Exception):
                scheduler.set_timesteps(count)
                found[name] = count
                break
    return found


def prediction_kind(pipeline: Any, name: str) -> str | None:
    """Returns the kind of prediction that a scheduler expects, or None if it cannot take a step."""
    try:
        scheduler = make_scheduler(pipeline, name)
        scheduler.set_timesteps(4)
        sample = torch.ones(1, 4, 8, 8)
        timestep = scheduler.timesteps[0]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        level = noise_level(scheduler, 0, timestep)
        stepped = scheduler.step(sample, timestep, sample, return_dict=False)[0]
    except Exception:  # For any reason: it is not offered.
        return None
    return level.kind if level is not None and torch.isfinite(stepped).all() else None
