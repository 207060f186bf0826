"""Decides from the class of a pipeline whether it turns text into images in one stage."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from calotype_server.engine.capabilities.components import DECODERS
from calotype_server.errors import ModelUnavailable

__all__ = ["check_class", "check_pipeline"]

_REQUIRED = ("prompt", "width", "height", "num_inference_steps")
_GIVEN = {"self", *_REQUIRED}


def check_class(model: str, kind: Any) -> None:
    """Rejects a pipeline class by the parameters of its call.

    Args:
        model: The model's name, for the message.
        kind: A class with the call of a pipeline.

    Raises:
        ModelUnavailable: The pipeline needs more than a prompt and a size, makes videos, or has several stages.
    """
    parameters = inspect.signature(kind.__call__).parameters
    if any(name.startswith("prior_") for name in parameters):
        raise _several_stages(model, kind)
    reason = _unsuitable(parameters)
    if reason is not None:
        raise ModelUnavailable(f"{model!r} is a {kind.__name__}, which does not turn text into images: it {reason}.")


def check_pipeline(model: str, pipeline: Any) -> None:
    """Rejects a loaded pipeline whose steps or latents cannot be followed.

    Args:
        model: The model's name, for the message.
        pipeline: The loaded pipeline.

    Raises:
        ModelUnavailable: See `check_class`; or the pipeline has no scheduler or no decoder.
    """
    kind = type(pipeline)
    check_class(model, kind)
    if any(isinstance(each, diffusers.DiffusionPipeline) for each in vars(pipeline).values()):
        raise _several_stages(model, kind)
    decodes = any(getattr(pipeline, name, None) is not None for name in DECODERS)
    if not decodes or getattr(pipeline, "scheduler", None) is None:
        raise ModelUnavailable(f"{model!r} is a {kind.__name__}, which is not a latent diffusion pipeline.")


def _unsuitable(parameters: Any) -> str | None:
    image = parameters.get("image")
    if image is not None and "strength" in parameters:
        return "starts from an image"
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in _GIVEN
    ]
    if required:
        return f"also needs {' and '.join(required)}"
    if not {"num_frames", "video_length"}.isdisjoint(parameters):
        return "makes videos"
    missing = [name for name in _REQUIRED if name not in parameters]
    return f"does not take {' and '.join(missing)}" if missing else None


def _several_stages(model: str, kind: Any) -> ModelUnavailable:
    return ModelUnavailable(
        f"{model!r} is a {kind.__name__}, which runs several pipelines one after another. Calotype can only show the "
        "steps of one; use a model with a single denoiser."
    )
