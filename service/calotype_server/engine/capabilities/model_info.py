"""Reads the capabilities and defaults of a pipeline from the pipeline itself."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server.engine.capabilities.components import denoiser_name, tokenizers
from calotype_server.engine.capabilities.guidance import read_guidance
from calotype_server.engine.capabilities.schedulers import compatible_schedulers, max_step_counts
from calotype_server.engine.capabilities.sizes import native_size, size_multiple
from calotype_server.types import ModelInfo

if TYPE_CHECKING:
    from calotype_server.engine.capabilities.defaults import Defaults

__all__ = ["describe"]

_log = structlog.get_logger(__name__)


def describe(name: str, pipeline: Any, defaults: Defaults) -> ModelInfo:
    """Reads sizes, defaults, schedulers and accepted parameters from a loaded pipeline."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    multiple = size_multiple(pipeline, denoiser)
    width, height = native_size(pipeline, denoiser, multiple)
    guidance = read_guidance(pipeline)
    scale = guidance.default
    if defaults.guidance_scale is not None:
        if guidance.parameter is None:
            _log.warning("the default guidance has no effect on this model", guidance_scale=defaults.guidance_scale)
        else:
            scale = defaults.guidance_scale
    schedulers = compatible_schedulers(pipeline)
    return ModelInfo(
        name=name,
        pipeline=type(pipeline).__name__,
        width=width,
        height=height,
        size_multiple=multiple,
        step_count=defaults.step_count or parameters["num_inference_steps"].default,
        guidance_scale=scale,
        takes_negative_prompt=guidance.takes_negative_prompt,
        negative_prompt_above=guidance.threshold,
        scheduler=type(pipeline.scheduler).__name__,
        schedulers=schedulers,
        max_step_counts=max_step_counts(pipeline, schedulers),
        max_prompt_tokens=max((limit for _, limit in tokenizers(pipeline)), default=0),
        device=str(denoiser.device),
        dtype=str(denoiser.dtype).removeprefix("torch."),
    )
