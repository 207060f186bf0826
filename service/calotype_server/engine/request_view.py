"""A request's view of the shared pipeline: a shallow copy with its own scheduler.

Pipelines are not thread-safe because schedulers keep state. The modules with the weights are shared.
"""

from __future__ import annotations

import copy
from typing import Any

import diffusers

__all__ = ["make_scheduler", "request_view"]


def make_scheduler(pipeline: Any, name: str) -> Any:
    """Returns a scheduler for one request: a deep copy of the pipeline's own, or another class with the same config."""
    own = pipeline.scheduler
    if name == type(own).__name__:
        return copy.deepcopy(own)
    # PNDM's default Runge-Kutta warm-up fails below four steps, and the released models skip it too.
    adjusted = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return getattr(diffusers, name).from_config(own.config, **adjusted)


def request_view(pipeline: Any, scheduler: Any, **replaced: Any) -> Any:
    """Returns a copy of `pipeline` that shares its modules, except for the given ones.

    Args:
        pipeline: The shared pipeline; not changed.
        scheduler: The request's own scheduler.
        replaced: Components to use instead of the pipeline's, such as `unet=`.
    """
    view = copy.copy(pipeline)
    # Assigning attributes would call `register_to_config` and write into the shared config.
    view.__dict__.update(replaced, scheduler=scheduler, _progress_bar_config={"disable": True})
    return view
