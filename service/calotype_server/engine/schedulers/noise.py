"""Makes the noise that a scheduler adds depend on the request's seed, whatever the pipeline passes."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["draw_noise_from"]


def draw_noise_from(scheduler: Any, generator: torch.Generator, seed: int) -> None:
    """Makes a scheduler draw its noise from a generator if the pipeline passes none.

    Pipelines of flow models call `step` without a generator, because their own scheduler draws nothing. A sampler that
    adds noise would then use the global random state: a seed would not determine the image.

    Args:
        scheduler: A scheduler that only this request uses.
        generator: The generator that the pipeline draws the initial noise from.
        seed: Seed of noise that does not come from a generator.
    """
    if hasattr(scheduler, "noise_sampler_seed"):
        # DPMSolverSDE draws a Brownian path, whose values depend on the interval but not on their order.
        scheduler.noise_sampler_seed = seed
    step = scheduler.step
    signature = inspect.signature(step)
    if "generator" not in signature.parameters:
        return

    @functools.wraps(step)
    def seeded_step(*args: Any, **kwargs: Any) -> Any:
        if signature.bind(*args, **kwargs).arguments.get("generator") is None:
            kwargs["generator"] = generator
        return step(*args, **kwargs)

    scheduler.step = seeded_step
