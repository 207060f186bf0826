"""Decides from the class of a pipeline whether it turns text into images."""

from __future__ import annotations

import inspect
from typing import Any

from calotype_server.errors import ModelUnavailable

__all__ = ["check_class", "check_pipeline"]


def check_class(model: str, kind: Any) -> None:
    """Rejects a pipeline class by the parameters of its call.

    Args:
        model: The model's name, for the message.
        kind: A class with the call of a pipeline.

    Raises:
        ModelUnavailable: The pipeline needs an image, makes videos, or does not take a prompt and a size.
    """
    parameters = inspect.signature(kind.__call__).parameters
    image = parameters.get("image")
    needs_image = image is not None and (image.default is image.empty or "strength" in parameters)
    makes_video = not {"num_frames", "video_length"}.isdisjoint(parameters)
    if needs_image or makes_video or not {"prompt", "width", "height", "num_inference_steps"} <= parameters.keys():
        raise ModelUnavailable(f"{model!r} is a {kind.__name__}, which does not turn text into images.")


def check_pipeline(model: str, pipeline: Any) -> None:
    """Rejects a pipeline whose steps or latents cannot be followed.

    Args:
        model: The model's name, for the message.
        pipeline: The loaded pipeline.

    Raises:
        ModelUnavailable: See `check_class`; or the pipeline has no scheduler or no decoder.
    """
    kind = type(pipeline)
    check_class(model, kind)
    if getattr(pipeline, "vae", None) is None or getattr(pipeline, "scheduler", None) is None:
        raise ModelUnavailable(f"{model!r} is a {kind.__name__}, which is not a latent diffusion pipeline.")
