"""Other solvers for flow models: they step through the noise levels of the model's own scheduler.

Which noise levels a flow model needs depends on the pipeline: it passes its own sigmas to `set_timesteps`, or a shift
that depends on the size of the image, and most schedulers of diffusers accept neither. Here the model's own scheduler
computes the noise levels, and another one steps through them.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from calotype_server.engine.schedulers.options import sigma_options, sigmas_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calotype_server.types import Sigmas

__all__ = ["FLOW_SCHEDULERS", "flow_scheduler", "flow_sigmas", "is_flow"]

_EULER, _HEUN, _LCM = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"

_SOLVERS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
"""Solvers for any noise schedule. DEIS and SA-Solver end before the noise-free image, so they are not listed."""

FLOW_SCHEDULERS = (*_SOLVERS, _EULER, _HEUN, _LCM)
"""Schedulers for flow models whose own one is among them too."""

_NEED_A_SHIFT = frozenset({_EULER, _LCM, "UniPCMultistepScheduler"})
"""They require `mu` if the config has `use_dynamic_shifting`."""

_BELOW_ONE = 1 - 1e-6
"""Solvers divide by 1 - sigma. Diffusers limits its own flow sigmas in the same way."""


def is_flow(own: Any) -> bool:
    """Whether other schedulers can step through the noise levels of a model's own one."""
    config = own.config
    if type(own).__name__ in (_EULER, _LCM):
        # Inverted sigmas rise to 1, and LCM's scale factors change the size of the image.
        return not config.get("invert_sigmas") and not config.get("scale_factors")
    return type(own).__name__ in _SOLVERS and bool(
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    )


def flow_sigmas(own: Any) -> tuple[Sigmas, ...]:
    """Returns the noise levels that requests may choose with any scheduler of a flow model.

    DPM-Solver and UniPC ignore the flow's shift with them, so a model with such a scheduler offers none.
    """
    return sigmas_of(type(own)) if type(own).__name__ in (_EULER, _LCM) else ()


def flow_scheduler(own: Any, class_name: str, options: Mapping[str, Any], sigmas: Sigmas | None, plain: bool) -> Any:
    """Returns a scheduler for a flow model.

    Args:
        own: The model's own scheduler, for which `is_flow` holds.
        class_name: One of `FLOW_SCHEDULERS`.
        options: Options of its `__init__`.
        sigmas: Noise levels, one of `flow_sigmas`, or None.
        plain: Whether None means the plain noise levels instead of those in the config of `own`.
    """
    chosen = sigma_options(type(own), sigmas) if (plain or sigmas) and flow_sigmas(own) else {}
    if {class_name, type(own).__name__} <= {_EULER, _LCM}:
        kind = getattr(diffusers, class_name)
        return kind.from_config(own.config, **options, **chosen)
    levels = type(own).from_config(own.config, **chosen) if chosen else copy.deepcopy(own)
    fixed = {"prediction_type": "flow_prediction", "shift_terminal": None} if class_name in _SOLVERS else {}
    scheduler = _stepping(class_name).from_config(own.config, **fixed, **options)
    scheduler.step_through(levels)
    return scheduler


@functools.cache
def _stepping(class_name: str) -> Any:
    """Returns a subclass with the same name, because pipelines and this package look at the names of classes."""
    return type(class_name, (_Stepping, getattr(diffusers, class_name)), {})


class _Stepping:
    """Takes the noise levels of another scheduler; a mixin for schedulers of diffusers."""

    config: Any
    order: int
    _levels: Any

    def step_through(self, levels: Any) -> None:
        """Sets the scheduler that computes the noise levels; this object owns it from now on."""
        self._levels = levels

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Sets the noise levels. The parameters are those of `FlowMatchEulerDiscreteScheduler.set_timesteps`."""
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        self._levels.set_timesteps(
            num_inference_steps, device=device, **{name: value for name, value in given.items() if value is not None}
        )
        name = type(self).__name__
        # Resets the solver. Its own noise levels are replaced, so this shift does not matter.
        shift = {"mu": 1.0} if name in _NEED_A_SHIFT and self.config.get("use_dynamic_shifting") else {}
        super().set_timesteps(len(self._levels.timesteps), device=device, **shift)  # type: ignore[misc]
        self.sigmas, self.timesteps = self._levels.sigmas, self._levels.timesteps
        if name in _SOLVERS:
            # They keep sigmas on the host, and compute no derivative of the logarithm at 1.
            self.sigmas = self.sigmas.cpu().clamp(max=_BELOW_ONE)
            return
        # DPM-Solver and UniPC have whole timesteps, which the others reject.
        self.timesteps = self.timesteps.float()
        if name == _HEUN:
            # Two evaluations for each step but the last.
            self.sigmas = torch.cat([self.sigmas[:1], self.sigmas[1:-1].repeat_interleave(2), self.sigmas[-1:]])
            self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])

    def _sigma_to_alpha_sigma_t(self, sigma: Any) -> tuple[Any, Any]:
        # As with `use_flow_sigmas`, which would make some pipelines drop their own sigmas.
        return 1 - sigma, sigma
