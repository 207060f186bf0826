"""A perfect model, to find schedulers that diffusers gets wrong with a model's config."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch

from calotype_server.engine.schedulers.predicted_x0 import NoiseLevel, noise_level

__all__ = ["ends_at_x0"]

_STEPS = 4

_TRUE_X0 = 2.0
"""Outside of -1 to 1, to which some schedulers clip."""

_SIGMAS = 4.0
"""Some schedulers leave the noise of the last timestep, as `set_alpha_to_one=False` intends: a few of its standard
deviations are tolerated. Those that diffusers gets wrong end much farther away."""

_ROUNDING = 1e-3


def ends_at_x0(scheduler: Any) -> bool:
    """Whether a scheduler ends at the true x0 with a model that knows it.

    Args:
        scheduler: A scheduler whose steps `noise_level` understands. It is used up.

    Raises:
        Exception: Of any kind, if it cannot take a step.
    """
    with warnings.catch_warnings():
        # Of torchsde, about rounded sigmas.
        warnings.simplefilter("ignore")
        return _ends_at_x0(scheduler)


def _ends_at_x0(scheduler: Any) -> bool:
    scheduler.set_timesteps(_STEPS)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 2, 2, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if takes_generator else {}
    for number, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        level = noise_level(scheduler, number, timestep)
        if level is None:
            return False
        output = _perfect_output(level, sample, scheduler.config.get("sigma_data"))
        sample = scheduler.step(output, timestep, sample, **noise, return_dict=False)[0]
    left = 0.0
    if hasattr(scheduler, "alphas_cumprod"):
        left = _SIGMAS * float(1 - scheduler.alphas_cumprod[0]) ** 0.5
    # NaN is not near x0 either.
    return bool((sample - _TRUE_X0).abs().max() < left + _ROUNDING)


def _perfect_output(level: NoiseLevel, sample: torch.Tensor, data_sigma: float | None) -> torch.Tensor:
    """Returns the output for which the predicted x0 is the true one: the inverse of `predict_x0`."""
    alpha, sigma = level.alpha, level.sigma
    if level.kind == "edm":
        assert data_sigma is not None
        total = sigma**2 + data_sigma**2
        return (_TRUE_X0 - data_sigma**2 / total * sample) * total**0.5 / (sigma * data_sigma)
    noise = (sample - alpha * _TRUE_X0) / sigma
    match level.kind:
        case "epsilon":
            return noise
        case "v_prediction":
            return (alpha * noise - sigma * _TRUE_X0) / (alpha**2 + sigma**2) ** 0.5
        case "flow_prediction":
            return noise - _TRUE_X0
        case "inverted_flow_prediction":
            return _TRUE_X0 - noise
    return torch.full_like(sample, _TRUE_X0)
