"""Translates a job into arguments of the pipeline's call."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.capabilities import read_guidance, tokenizers
from calotype_server.types import Notice

if TYPE_CHECKING:
    from calotype_server.types import Job

__all__ = ["call_arguments", "prompt_notices"]


def call_arguments(pipeline: Any, job: Job) -> dict[str, Any]:
    """Returns the keyword arguments of a pipeline's call for a job."""
    arguments: dict[str, Any] = {
        "prompt": job.prompt,
        "width": job.width,
        "height": job.height,
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
    """Returns a notice for each prompt that is longer than the limit of every tokenizer of the pipeline."""
    found = tokenizers(pipeline)
    if not found:
        return ()
    tokenizer, limit = max(found, key=lambda each: each[1])
    notices = []
    for name, text in (("prompt", job.prompt), ("negative prompt", job.negative_prompt)):
        count = len(tokenizer(text, truncation=False)["input_ids"]) if text else 0
        if count > limit:
            message = f"The {name} has {count} tokens; the model read only the first {limit}."
            notices.append(Notice("PROMPT_TRUNCATED", message))
    return tuple(notices)
