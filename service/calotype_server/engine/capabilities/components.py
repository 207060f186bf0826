"""Finds the denoiser and the tokenizers of a pipeline."""

from __future__ import annotations

import inspect
from typing import Any

from calotype_server.errors import ModelUnavailable

__all__ = ["denoiser_name", "tokenizers"]

_DENOISERS = ("transformer", "unet")


def denoiser_name(pipeline: Any) -> str:
    """Returns the attribute that holds the denoiser, which a pipeline calls once or twice a step.

    Raises:
        ModelUnavailable: There is none.
    """
    for name in _DENOISERS:
        if getattr(pipeline, name, None) is not None:
            return name
    raise ModelUnavailable(f"A {type(pipeline).__name__} has neither a transformer nor a UNet.")


def tokenizers(pipeline: Any) -> list[tuple[Any, int]]:
    """Returns every tokenizer with the number of tokens that the pipeline reads, special tokens included."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    found = []
    for name, component in pipeline.components.items():
        if not name.startswith("tokenizer") or component is None:
            continue
        limit = component.model_max_length
        # The first of two is CLIP's, which has its own limit. The pipeline truncates for T5 and language models.
        if parameter is not None and (limit > 77 or name != "tokenizer"):
            limit = parameter.default
        if limit < 1_000_000:
            found.append((component, limit))
    return found
