"""Reads the capabilities and defaults of a pipeline from the pipeline itself."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server.engine.capabilities.components import denoiser_name, tokenizers
from calotype_server.engine.capabilities.guidance import read_guidance
from calotype_server.engine.capabilities.schedulers import compatible_schedulers, max_step_counts, scheduler_details
from calotype_server.engine.capabilities.sizes import size_multiple, supported_sizes
from calotype_server.engine.capabilities.weights import offload_of, quantization_of
from calotype_server.engine.machine import device_of
from calotype_server.types import ModelInfo, OtherSizes

if TYPE_CHECKING:
    from calotype_server.engine.capabilities.defaults import Defaults

__all__ = ["describe"]

_log = structlog.get_logger(__name__)


def describe(name: str, pipeline: Any, defaults: Defaults, other_sizes: OtherSizes = OtherSizes.REJECT) -> ModelInfo:
    """Reads sizes, defaults, schedulers and accepted parameters from a loaded pipeline.

    Raises:
        ModelUnavailable: The pipeline cannot draw one of the `sizes` in `defaults`.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    multiple = size_multiple(pipeline, denoiser)
    sizes = supported_sizes(pipeline, multiple, defaults, other_sizes)
    width, height = sizes.sizes[0]
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
        scheduler_details=scheduler_details(pipeline, schedulers),
        max_prompt_tokens=max((limit for _, limit in tokenizers(pipeline)), default=0),
        device=str(device_of(denoiser)),
        dtype=str(denoiser.dtype).removeprefix("torch."),
        sizes=sizes.sizes,
        min_pixels=sizes.min_pixels,
        max_pixels=sizes.max_pixels,
        max_aspect_ratio=sizes.max_aspect_ratio,
        scales_other_sizes=other_sizes is OtherSizes.SCALE,
        quantization=quantization_of(pipeline),
        offload=offload_of(pipeline, denoiser),
    )
