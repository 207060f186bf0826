"""Decides which syntaxes of prompts a pipeline supports."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import transformers

from calotype_server.engine.capabilities import denoiser_name
from calotype_server.types import PromptSyntax

__all__ = ["encoders", "prompt_syntaxes"]

_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text encoders and their tokenizers."""

_CLIP = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)


def prompt_syntaxes(pipeline: Any) -> tuple[PromptSyntax, ...]:
    """Returns the syntaxes of prompts that a pipeline supports.

    Weights need text encoders that are all CLIP, and a UNet, which reads embeddings of any length: Stable Diffusion
    1.x, 2.x and XL, and pipelines derived from them. T5 and language models read long prompts without chunks, and the
    web UI's weights are not defined for them.
    """
    supported = (
        isinstance(getattr(pipeline, denoiser_name(pipeline)), diffusers.UNet2DConditionModel)
        and bool(encoders(pipeline))
        and _encodes_prompts(pipeline)
    )
    return (PromptSyntax.PLAIN, PromptSyntax.WEIGHTED) if supported else (PromptSyntax.PLAIN,)


def encoders(pipeline: Any) -> list[tuple[str, Any]]:
    """Returns the name of the tokenizer and the text encoder of each pair; none unless all of them are CLIP."""
    names = [name for name in pipeline.components if "text_encoder" in name]
    found = [(_ENCODERS.get(name, ""), getattr(pipeline, name)) for name in names]
    if not all(
        isinstance(encoder, _CLIP) and isinstance(getattr(pipeline, name, None), transformers.CLIPTokenizer)
        for name, encoder in found
    ):
        return []
    return found


def _encodes_prompts(pipeline: Any) -> bool:
    """Whether the pipeline's call encodes its prompt with a method that takes both prompts as text."""
    kind = type(pipeline)
    encode = getattr(kind, "encode_prompt", None)
    if encode is None or not {"prompt", "negative_prompt"} <= inspect.signature(encode).parameters.keys():
        return False
    return "encode_prompt" in inspect.unwrap(kind.__call__).__code__.co_names
