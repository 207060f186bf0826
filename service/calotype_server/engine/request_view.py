"""A request's view of the shared pipeline: a shallow copy with a scheduler of its own.

Pipelines are not thread-safe because schedulers keep state; the modules with the weights are shared.
"""

from __future__ import annotations

import copy
from typing import Any

import diffusers

__all__ = ["make_scheduler", "request_view"]


def make_scheduler(pipeline: Any, name: str) -> Any:
    """Returns a scheduler for one request: a deep copy of the pipeline's own, or another class with its config."""
    own = pipeline.scheduler
    if name == type(own).__name__:
        return copy.deepcopy(own)
    # PNDM's default Runge-Kutta warm-up fails below four steps; the released models skip it as well.
    adjusted = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return getattr(diffusers, name).from_config(own.config, **adjusted)


def request_view(pipeline: Any, scheduler: Any, **replaced: Any) -> Any:
    """Returns a copy of `pipeline` that shares its modules, but has `scheduler` and whatever else is given.

    Args:
        pipeline: The shared pipeline; not changed.
        scheduler: The request's own.
        replaced: Components to put in place of the pipeline's, such as `unet=`.
    """
    view = copy.copy(pipeline)
    # Plain attribute assignment would go through `register_to_config` and write into the shared config.
    view.__dict__.update(replaced, scheduler=scheduler, _progress_bar_config={"disable": True})
    return view
