"""Translates a job into arguments of the pipeline's call."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.capabilities import read_guidance, tokenizers
from calotype_server.engine.prompts.notices import ignored_weights
from calotype_server.types import Notice, PromptSyntax

if TYPE_CHECKING:
    from calotype_server.types import Job

__all__ = ["call_arguments", "prompt_notices", "size_arguments"]


def size_arguments(pipeline: Any, width: int, height: int) -> dict[str, Any]:
    """Returns arguments with which the pipeline draws exactly this size, in pixels.

    Some pipelines draw the nearest size that the real model was trained for, and some then resize the image. An image
    that is finished early would have another size, and limits would count another number of pixels.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    exact = {"use_resolution_binning": False, "_auto_resize": False, "max_area": width * height}
    chosen = {name: value for name, value in exact.items() if name in parameters}
    return {"width": width, "height": height, **chosen}


def call_arguments(pipeline: Any, job: Job) -> dict[str, Any]:
    """Returns the keyword arguments of a pipeline's call for a job."""
    arguments: dict[str, Any] = {
        "prompt": job.prompt,
        **size_arguments(pipeline, job.width, job.height),
        "num_inference_steps": job.step_count,
        # On the CPU, so that a seed gives the same image on every device.
        "generator": torch.Generator().manual_seed(job.seed),
        "output_type": "pt",
    }
    if job.step_count != 2 and "intermediate_timesteps" in inspect.signature(type(pipeline).__call__).parameters:
        # Sana-Sprint's default is the timestep between two steps; with any other number of steps it requires None.
        arguments["intermediate_timesteps"] = None
    return arguments | read_guidance(pipeline).arguments(job.guidance_scale, job.negative_prompt, job.step_count)


def prompt_notices(pipeline: Any, job: Job) -> tuple[Notice, ...]:
    """Returns a notice for each problem of the prompts that does not stop the job."""
    return (*_truncated(pipeline, job), *ignored_weights(pipeline, job))


def _truncated(pipeline: Any, job: Job) -> tuple[Notice, ...]:
    """Returns a notice for each prompt that is longer than the limit of every tokenizer of the pipeline."""
    found = tokenizers(pipeline)
    if not found or job.prompt_syntax is PromptSyntax.WEIGHTED:
        return ()
    tokenizer, limit = max(found, key=lambda each: each[1])
    notices = []
    for name, text in (("prompt", job.prompt), ("negative prompt", job.negative_prompt)):
        count = len(tokenizer(text, truncation=False)["input_ids"]) if text else 0
        if count > limit:
            message = f"The {name} has {count} tokens; the model read only the first {limit}."
            notices.append(Notice("PROMPT_TRUNCATED", message))
    return tuple(notices)
