"""A perfect model: it knows the true x0, so that a correct scheduler must end there."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.schedulers.predicted_x0 import noise_level, predict_x0

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Evaluation", "oracle", "own_noise_level", "walk"]

_SHAPE = (1, 4, 6, 6)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model.

    Attributes:
        x0: The true x0.
        predicted: The x0 that Calotype predicts.
        output: Result of the scheduler's `step`.
        scale: Factor of rounding errors: the sample's rounding grows with the noise that is divided out of it.
    """

    x0: torch.Tensor
    predicted: torch.Tensor | None
    output: Any
    scale: float


def own_noise_level(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """Returns alpha and sigma at the next evaluation, taken from the scheduler's own forward process."""
    if scheduler.config.get("invert_sigmas"):
        # Its forward process takes these sigmas for plain ones. The pipelines start from noise, where they are 0.
        index = scheduler.step_index
        index = scheduler.index_for_timestep(timestep) if index is None else index
        return float(scheduler.sigmas[index]), 1 - float(scheduler.sigmas[index])
    if type(scheduler).__name__ == "SASolverScheduler":
        # Its forward process uses whole timesteps only, but its steps use the exact sigmas.
        index = scheduler.step_index or 0
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
        return float(alpha), float(sigma)
    # Shallow, because no method below changes a tensor; a deep copy of a Brownian path takes long.
    probe = copy.copy(scheduler)
    if getattr(probe, "step_index", None) is not None and hasattr(probe, "set_begin_index"):
        # With a begin index set, the forward process looks at the step index, which distinguishes equal timesteps.
        probe.set_begin_index(0)
    two_stages = hasattr(probe, "sigmas_interpol") or hasattr(probe, "mid_point_sigma")
    if getattr(probe, "state_in_first_order", True) is False and two_stages:
        # The forward process knows nothing of the second stage, halfway to the next sigma, but the scaling of the
        # model's input does: it divides by sqrt(sigma^2 + 1).
        scaled = float(probe.scale_model_input(torch.ones(1, dtype=torch.float64), timestep))
        return 1.0, (scaled**-2 - 1) ** 0.5
    one, zero, when = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.as_tensor(timestep).reshape(1)
    if hasattr(probe, "scale_noise"):
        return float(probe.scale_noise(one, when, zero)), float(probe.scale_noise(zero, when, one))
    return float(probe.add_noise(one, zero, when)), float(probe.add_noise(zero, one, when))


def oracle(
    kind: str, alpha: float, sigma: float, x0: torch.Tensor, sample: torch.Tensor, data_sigma: float | None
) -> torch.Tensor:
    """Returns the answer of a perfect model, from the definitions of the prediction types."""
    noise = (sample - alpha * x0) / sigma
    norm = (alpha**2 + sigma**2) ** 0.5
    match kind:
        case "epsilon":
            return noise
        case "sample":
            return x0
        case "v_prediction":
            return (alpha * noise - sigma * x0) / norm
        case "flow_prediction":
            return noise - x0
        case "inverted_flow_prediction":
            return x0 - noise
        case "edm" | "edm_v":
            # Karras et al. 2022, eq. 7 and table 1: D = c_skip x + c_out F, and D must be the true x0. With
            # v-prediction, diffusers negates c_out.
            assert data_sigma is not None
            total = sigma**2 + data_sigma**2
            output = (x0 - data_sigma**2 / total * sample) * total**0.5 / (sigma * data_sigma)
            return output if kind == "edm" else -output
    raise AssertionError(kind)


def walk(scheduler: Any, kind: str, steps: int = 6, **given: Any) -> Iterator[Evaluation]:
    """Runs a copy of a scheduler on the oracle.

    Args:
        scheduler: A scheduler of diffusers; not changed.
        kind: Kind of prediction.
        steps: Number of steps.
        given: Further arguments of `set_timesteps`.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, **given)
    random = torch.Generator().manual_seed(0)
    x0 = 0.7 * torch.randn(_SHAPE, generator=random)
    sample = torch.randn(_SHAPE, generator=random) * getattr(scheduler, "init_noise_sigma", 1.0)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    for number, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        alpha, sigma = own_noise_level(scheduler, timestep)
        if sigma < 1e-4:
            # Nothing is left to predict, and the oracle would divide by zero.
            break
        output = oracle(kind, alpha, sigma, x0, sample, scheduler.config.get("sigma_data"))
        level = noise_level(scheduler, number, timestep)
        predicted = None if level is None else predict_x0(scheduler, level, sample, output)
        stepped = scheduler.step(output, timestep, sample, **({"generator": random} if takes_generator else {}))
        # Flow divides by nothing.
        yield Evaluation(x0, predicted, stepped, 1.0 if "flow" in kind else max(1.0, sigma / max(alpha, 1e-4)))
        sample = stepped.prev_sample
