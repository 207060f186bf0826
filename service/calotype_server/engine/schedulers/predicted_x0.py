"""The predicted x0 of a denoising step, for any diffusers scheduler.

Every scheduler's sample is `x = alpha * x0 + sigma * noise` in its own space. From alpha and sigma at the point where
the model was evaluated, and from the kind of prediction, x0 follows:

| the model predicts | x0 |
|---|---|
| `epsilon` (noise) | `(x - sigma * m) / alpha` |
| `sample` (x0 itself) | `m` |
| `v_prediction` (Salimans & Ho 2022, arXiv 2202.00512, appendix D) | `alpha * x / n^2 - sigma * m / n` |
| `flow_prediction` (noise - x0; Lipman et al. 2023, arXiv 2210.02747) | `x - sigma * m` |
| `inverted_flow_prediction` (x0 - noise; `invert_sigmas`, as OmniGen) | `x + sigma * m` |
| EDM (Karras et al. 2022, arXiv 2206.00364, eq. 7) | the scheduler's `precondition_outputs` |

`n^2 = alpha^2 + sigma^2` is 1 for variance-preserving schedulers; with it, the formula also holds for
variance-exploding ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["NoiseLevel", "noise_level", "predict_x0"]


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """The point of a model evaluation on the noise schedule.

    Attributes:
        kind: A prediction type of the table above, or "edm".
        alpha: Factor of x0, a float or 0-d tensor; None for "edm".
        sigma: Factor of the noise, a float or 0-d tensor.
    """

    kind: str
    alpha: Any
    sigma: Any


def noise_level(scheduler: Any, evaluation: int, timestep: Any) -> NoiseLevel | None:
    """Returns the noise level of a model evaluation, or None for an unknown kind of scheduler.

    Call it before `scheduler.step`, which advances the scheduler.

    Args:
        scheduler: Any diffusers scheduler, after `set_timesteps`.
        evaluation: Number of calls of `step` so far.
        timestep: The timestep that `step` will receive.
    """
    kind = scheduler.config.get("prediction_type")
    kind = {"original_sample": "sample"}.get(kind, kind)
    sigmas: Any = getattr(scheduler, "sigmas", None)
    index = _step_index(scheduler, evaluation, timestep)
    if hasattr(scheduler, "precondition_outputs"):
        return NoiseLevel("edm", None, sigmas[index])
    if sigmas is not None and kind in (None, "flow_prediction") and hasattr(scheduler, "scale_noise"):
        if scheduler.config.get("invert_sigmas"):
            # These `sigmas` rise to 1: they are the factors of x0.
            return NoiseLevel("inverted_flow_prediction", sigmas[index], 1 - sigmas[index])
        return NoiseLevel("flow_prediction", 1 - sigmas[index], sigmas[index])
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        # DPM-Solver, DEIS, UniPC, SA-Solver: their `sigmas` are sigma / alpha.
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigmas[index])
        return NoiseLevel(kind, alpha, sigma)
    if sigmas is not None and hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "scale_model_input"):
        if hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order:
            # The second stage of KDPM2 lies between two sigmas.
            sigmas = scheduler.sigmas_interpol
            # The ancestral variant stores them one index earlier.
            index -= hasattr(scheduler, "sigmas_up")
        if getattr(scheduler, "mid_point_sigma", None) is not None:
            # The second stage of DPMSolverSDE.
            return NoiseLevel(kind, 1.0, scheduler.mid_point_sigma)
        return NoiseLevel(kind, 1.0, sigmas[index])
    if hasattr(scheduler, "alphas_cumprod") and kind is not None:
        cumulative = scheduler.alphas_cumprod[int(timestep)]
        return NoiseLevel(kind, cumulative**0.5, (1 - cumulative) ** 0.5)
    return None


def predict_x0(
    scheduler: Any, level: NoiseLevel, sample: torch.Tensor, model_output: torch.Tensor
) -> torch.Tensor | None:
    """Returns the predicted x0 in the scheduler's sample space, or None for an unknown prediction type.

    Args:
        scheduler: The scheduler of `level`; only EDM's preconditioning needs it.
        level: Noise level of this evaluation.
        sample: Noisy latents before the step, any layout with the batch first.
        model_output: The argument of `step`, after guidance. Channels beyond those of `sample`, a learned variance, are
            dropped.
    """
    if model_output.shape != sample.shape and model_output.ndim == sample.ndim:
        model_output = model_output[:, : sample.shape[1]]
    alpha, sigma = level.alpha, level.sigma
    match level.kind:
        case "epsilon":
            return (sample - sigma * model_output) / alpha
        case "sample":
            return model_output
        case "v_prediction":
            norm = alpha * alpha + sigma * sigma
            return (alpha / norm) * sample - (sigma / norm**0.5) * model_output
        case "flow_prediction":
            return sample - sigma * model_output
        case "inverted_flow_prediction":
            return sample + sigma * model_output
        case "edm":
            return scheduler.precondition_outputs(sample, model_output, sigma)
    return None


def _step_index(scheduler: Any, evaluation: int, timestep: Any) -> int:
    """Returns the scheduler's own index. The scheduler sets it only inside its first `step`."""
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    if index is None and hasattr(scheduler, "index_for_timestep") and hasattr(scheduler, "sigmas"):
        index = scheduler.index_for_timestep(timestep)
    return evaluation if index is None else int(index)
