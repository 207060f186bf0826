"""Finds the parameter of a pipeline that sets its guidance, and whether a negative prompt has an effect.

A pipeline ignores some of the parameters that its call accepts, depending on the weights:

| pipelines | guidance scale | negative prompt |
|---|---|---|
| most | `guidance_scale`, classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) | above 1, in some above 0 |
| the denoiser has `guidance_embeds` or `time_cond_proj_dim` (FLUX.1-dev, FLUX.2-dev, LCM) | its input | none |
| distilled to a fixed guidance (FLUX.1-schnell, FLUX.2-klein) | none | none |
| Qwen-Image | `true_cfg_scale`, which needs a negative prompt, if only a blank one | above 1 |
| with a guider (HunyuanImage) | none, or the denoiser's input | if the guider uses one |

FLUX.1 has `true_cfg_scale` in addition to its distilled guidance. Calotype does not offer it: it doubles the time of an
image, needs a second scale, and the weights are not trained for it.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any

from calotype_server.engine.capabilities.components import denoiser_name

__all__ = ["Guidance", "read_guidance"]

_BLANK = " "
"""The negative prompt that the authors of Qwen-Image recommend if there is nothing to avoid."""

_STRONG = 100.0
_DEFAULT_THRESHOLD = 1.0


@dataclass(frozen=True, slots=True)
class Guidance:
    """How a pipeline is guided.

    Attributes:
        parameter: Parameter of the call that sets the scale; None if no scale has an effect.
        default: Its default; None without a parameter.
        takes_negative_prompt: Whether a negative prompt can have an effect.
        threshold: A negative prompt has an effect only with a scale above this one; None if it always has one.
        schedule: Scale of each step of the default call, if the pipeline changes it from step to step; the first one is
            the default.
    """

    parameter: str | None
    default: float | None
    takes_negative_prompt: bool
    threshold: float | None = None
    schedule: tuple[float, ...] = ()

    def arguments(
        self, scale: float | None, negative_prompt: str | None = None, step_count: int | None = None
    ) -> dict[str, Any]:
        """Returns the arguments of a pipeline's call.

        Args:
            scale: The guidance scale; None for the pipeline's default.
            negative_prompt: The negative prompt, if any.
            step_count: Steps of the call; None if unknown, then all steps have the same scale.
        """
        arguments: dict[str, Any] = {}
        if scale is not None and self.parameter is not None:
            arguments[self.parameter] = scale
            if self.schedule:
                arguments |= self._scheduled(scale, step_count)
            if self.parameter == "true_cfg_scale" and scale > _DEFAULT_THRESHOLD:
                # Without a negative prompt, the pipeline ignores the scale.
                arguments["negative_prompt"] = _BLANK
        if negative_prompt is not None:
            arguments["negative_prompt"] = negative_prompt
        return arguments

    def _scheduled(self, scale: float, step_count: int | None) -> dict[str, Any]:
        """Returns the pipeline's schedule, stretched to the number of steps and scaled to start with `scale`."""
        if step_count is None:
            return {"guidance_schedule": None}
        first, length = self.schedule[0], len(self.schedule)
        stretched = (self.schedule[step * length // step_count] for step in range(step_count))
        return {"guidance_scale": None, "guidance_schedule": tuple(each * scale / first for each in stretched)}


def read_guidance(pipeline: Any) -> Guidance:
    """Reads the guidance of a loaded pipeline from its signature and configs."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    denoiser = getattr(pipeline, denoiser_name(pipeline)).config
    has_negative = "negative_prompt" in parameters
    embedded = bool(denoiser.get("guidance_embeds")) or denoiser.get("time_cond_proj_dim") is not None
    distilled = _distilled(parameters, "guidance_scale" if embedded else None)
    if "true_cfg_scale" in parameters:
        if "guidance_scale" in parameters and parameters["guidance_scale"].default is not None:
            return distilled
        return Guidance("true_cfg_scale", parameters["true_cfg_scale"].default, has_negative, _DEFAULT_THRESHOLD)
    if "guider" in pipeline.components:
        guider = pipeline.guider
        distilled = _distilled(parameters, "distilled_guidance_scale" if embedded else None)
        return replace(distilled, takes_negative_prompt=guider is not None and guider.num_conditions > 1)
    if "guidance_scale" not in parameters:
        return Guidance(None, None, has_negative)
    threshold = _threshold(pipeline)
    # A denoiser with this key in its config, but without a negative prompt, is guided by its own input or not at all.
    decided = has_negative or "guidance_embeds" not in denoiser or _states_guidance(pipeline)
    if threshold is None or not decided:
        return distilled
    schedule = tuple(getattr(parameters.get("guidance_schedule"), "default", None) or ())
    default = schedule[0] if schedule else parameters["guidance_scale"].default
    return Guidance("guidance_scale", float(default), has_negative, threshold, schedule)


def _distilled(parameters: Any, name: str | None) -> Guidance:
    """Returns the guidance of a denoiser that takes the scale as its input, or of one that ignores it."""
    if name is None or name not in parameters:
        return Guidance(None, None, takes_negative_prompt=False)
    return Guidance(name, parameters[name].default, takes_negative_prompt=False)


def _states_guidance(pipeline: Any) -> bool:
    """Whether the pipeline says, by a property, when it uses classifier-free guidance."""
    return isinstance(getattr(type(pipeline), "do_classifier_free_guidance", None), property)


def _threshold(pipeline: Any) -> float | None:
    """Returns the scale above which a pipeline uses classifier-free guidance, or None if it never does."""
    call = inspect.unwrap(type(pipeline).__call__)
    if not _states_guidance(pipeline) or "do_classifier_free_guidance" in call.__code__.co_varnames:
        return _DEFAULT_THRESHOLD

    def guides(scale: float) -> bool:
        view = copy.copy(pipeline)
        view.__dict__["_guidance_scale"] = scale
        return bool(view.do_classifier_free_guidance)

    if not guides(_STRONG):
        return None
    return 0.0 if guides(_DEFAULT_THRESHOLD) else _DEFAULT_THRESHOLD
