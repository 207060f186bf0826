"""Makes the scheduler of a request."""

from __future__ import annotations

import copy
from typing import Any

import diffusers

__all__ = ["make_scheduler"]


def make_scheduler(pipeline: Any, name: str) -> Any:
    """Returns a scheduler for one request: a deep copy of the pipeline's own, or another class with the same config."""
    own = pipeline.scheduler
    if name == type(own).__name__:
        return copy.deepcopy(own)
    # PNDM's default Runge-Kutta warm-up fails below four steps, and the released models skip it too.
    adjusted = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return getattr(diffusers, name).from_config(own.config, **adjusted)
