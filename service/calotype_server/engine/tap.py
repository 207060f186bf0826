"""StepTap: sees every denoising step of one request from inside its scheduler.

One seam gives progress, the predicted x0 and cancellation, for every pipeline that calls `scheduler.step`: also for
those that lack `callback_on_step_end` or ignore `interrupt`. It only looks, so the result stays bit-identical.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calotype_server.engine.predicted_x0 import NoiseLevel, noise_level, predict_x0

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["Step", "StepTap", "Stopped"]


class Stopped(BaseException):
    """Ends a pipeline call from within. A `BaseException`, so that no `except Exception` on the way swallows it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One finished scheduler step.

    Attributes:
        number: From 1.
        total: Steps in all: `len(scheduler.timesteps)`, which is not the step count for every scheduler.
        sample: Noisy latents before the step.
        model_output: The model's prediction, after guidance.
        level: Noise level of the evaluation, None where unknown.
        reported: x0 as the scheduler itself reported it, if it did.
        scheduler: For EDM's preconditioning.
    """

    number: int
    total: int
    sample: torch.Tensor
    model_output: torch.Tensor
    level: NoiseLevel | None
    reported: torch.Tensor | None
    scheduler: Any

    def x0(self) -> torch.Tensor | None:
        """Returns the predicted x0 in the scheduler's sample space; None when the scheduler is not understood."""
        if self.reported is not None:
            return self.reported
        if self.level is None:
            return None
        return predict_x0(self.scheduler, self.level, self.sample, self.model_output)


class StepTap:
    """Patches `set_timesteps` and `step` of one scheduler, which must be the request's own.

    Args:
        scheduler: A scheduler nobody else uses.
        on_start: Called with the total when the timesteps are set: encoding has ended, denoising begins.
        on_step: Called after every step.
        should_stop: Asked when the timesteps are set, and before and after every step; True raises `Stopped`.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        on_start: Callable[[int], None],
        on_step: Callable[[Step], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.last: Step | None = None
        set_timesteps, step = scheduler.set_timesteps, scheduler.step
        done = 0

        # `wraps` keeps the signatures, in which pipelines look for `sigmas`, `eta` or `generator`.
        @functools.wraps(set_timesteps)
        def tapped_set_timesteps(*args: Any, **kwargs: Any) -> None:
            nonlocal done
            set_timesteps(*args, **kwargs)
            done = 0
            on_start(_total(scheduler))
            if should_stop():
                raise Stopped

        @functools.wraps(step)
        def tapped_step(
            model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            nonlocal done
            return_dict = kwargs.pop("return_dict", True)
            if should_stop():
                raise Stopped
            level = noise_level(scheduler, done, timestep)
            output = step(model_output, timestep, sample, *args, **kwargs, return_dict=True)
            done += 1
            self.last = Step(done, _total(scheduler), sample, model_output, level, _reported_x0(output), scheduler)
            on_step(self.last)
            if should_stop():
                raise Stopped
            return output if return_dict else output.to_tuple()

        scheduler.set_timesteps = tapped_set_timesteps
        scheduler.step = tapped_step


def _total(scheduler: Any) -> int:
    """Steps that a pipeline takes. SCM and Wuerstchen list the noise-free end too, and pipelines leave it out."""
    return len(scheduler.timesteps) - (type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler"))


def _reported_x0(output: Any) -> torch.Tensor | None:
    """What the scheduler says about x0. LCM's `denoised` is its consistency output: closer than its x0."""
    for name in ("denoised", "pred_original_sample"):
        value = getattr(output, name, None)
        if value is not None:
            return value
    return None
