"""Finds the denoiser, the decoder and the tokenizers of a pipeline."""

from __future__ import annotations

import inspect
from typing import Any

from calotype_server.errors import ModelUnavailable

__all__ = ["DECODERS", "DENOISERS", "decoder", "decoder_name", "denoiser_name", "tokenizers"]

DENOISERS = ("transformer", "unet")
"""Attributes of pipelines for the denoiser, the first that a pipeline has."""

DECODERS = ("vae", "movq", "vqvae")
"""Attributes of pipelines for the decoder of latents: most, Kandinsky, and latent diffusion (LDM)."""


def denoiser_name(pipeline: Any) -> str:
    """Returns the attribute that holds the denoiser, which a pipeline calls once or twice a step.

    Raises:
        ModelUnavailable: There is none.
    """
    for name in DENOISERS:
        if getattr(pipeline, name, None) is not None:
            return name
    raise ModelUnavailable(f"A {type(pipeline).__name__} has neither a transformer nor a UNet.")


def decoder_name(pipeline: Any) -> str:
    """Returns the attribute that holds the decoder, which turns latents into images.

    Raises:
        ModelUnavailable: There is none.
    """
    for name in DECODERS:
        if getattr(pipeline, name, None) is not None:
            return name
    raise ModelUnavailable(f"A {type(pipeline).__name__} has no decoder of latents.")


def decoder(pipeline: Any) -> Any:
    """Returns the decoder of a pipeline; see `decoder_name`."""
    return getattr(pipeline, decoder_name(pipeline))


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
