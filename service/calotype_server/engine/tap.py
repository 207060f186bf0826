"""StepTap: observes every denoising step of one request from inside its scheduler.

This one place provides progress, the predicted x0 and cancellation, for every pipeline that calls `scheduler.step`,
including those without `callback_on_step_end` and those that ignore `interrupt`. It only observes, so the result stays
bit-identical, unless a step cache forecasts the model's output.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calotype_server.engine.schedulers.predicted_x0 import NoiseLevel, noise_level, predict_x0

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["Step", "StepTap", "Stopped"]


class Stopped(BaseException):
    """Ends a pipeline call from inside. It is a `BaseException`, so that no `except Exception` can catch it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One finished scheduler step.

    Attributes:
        number: Number of the step, from 1.
        total: Number of all steps: `len(scheduler.timesteps)`, which differs from the step count for some schedulers.
        sample: Noisy latents before the step.
        model_output: The model's prediction, after guidance.
        level: Noise level of the evaluation; None if unknown.
        reported: x0 as reported by the scheduler, if it does.
        scheduler: Needed for EDM's preconditioning.
    """

    number: int
    total: int
    sample: torch.Tensor
    model_output: torch.Tensor
    level: NoiseLevel | None
    reported: torch.Tensor | None
    scheduler: Any

    def x0(self) -> torch.Tensor | None:
        """Returns the predicted x0 in the scheduler's sample space, or None for an unknown kind of scheduler."""
        if self.reported is not None:
            return self.reported
        if self.level is None:
            return None
        return predict_x0(self.scheduler, self.level, self.sample, self.model_output)


class StepTap:
    """Wraps `set_timesteps` and `step` of one scheduler, which must belong to one request.

    Args:
        scheduler: A scheduler that only this request uses.
        on_start: Called with the total number of steps when the timesteps are set: denoising starts.
        on_step: Called after every step.
        should_stop: Called when the timesteps are set, and before and after every step; True raises `Stopped`.
        settle: Called before every step with its noise level, the sample and the model's output; returns the output
            that the scheduler receives. None: the output as it is.

    Attributes:
        last: The last finished step, or None.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        on_start: Callable[[int], None],
        on_step: Callable[[Step], None],
        should_stop: Callable[[], bool],
        settle: Callable[[NoiseLevel | None, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.last: Step | None = None
        set_timesteps, step = scheduler.set_timesteps, scheduler.step
        done = 0

        # `wraps` keeps the signatures: pipelines check them for `sigmas`, `eta` or `generator`.
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
            if settle is not None:
                model_output = settle(level, sample, model_output)
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
    """Returns the number of steps that a pipeline takes. SCM and Wuerstchen list the noise-free end as well."""
    return len(scheduler.timesteps) - (type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler"))


def _reported_x0(output: Any) -> torch.Tensor | None:
    """Returns the scheduler's own x0. LCM's `denoised` is its consistency output, which is closer than its x0."""
    for name in ("denoised", "pred_original_sample"):
        value = getattr(output, name, None)
        if value is not None:
            return value
    return None
