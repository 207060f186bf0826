"""Loads textual inversions: embeddings of words that a text encoder was not trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import safetensors.torch
import structlog

from calotype_server.engine.loading.explain import first_line
from calotype_server.engine.loading.quiet import quiet
from calotype_server.engine.loading.weight_files import load_weight_files
from calotype_server.engine.prompts.support import encoders
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

__all__ = ["load_embeddings"]

_log = structlog.get_logger(__name__)

_USUAL_FILE = "learned_embeds.safetensors"
"""The file in most folders and repositories."""

_XL_KEYS = ("clip_l", "clip_g")
"""Keys of the embeddings for the two text encoders of Stable Diffusion XL, in the order of the encoders."""


def load_embeddings(pipeline: Any, sources: Mapping[str, str], *, download: bool = True) -> None:
    """Adds textual inversions to the tokenizers and text encoders of a pipeline.

    Args:
        pipeline: The loaded pipeline; changed, so it must not be in use yet.
        sources: Maps the name of each embedding to `PATH_OR_HUB_ID[:FILE]`, all as safetensors.
        download: Whether a hub id may be downloaded; otherwise it must be in the local cache.

    Raises:
        ModelUnavailable: At least one cannot be used with this model. The message names each of them and the reason.
    """
    if not sources:
        return
    kind = type(pipeline).__name__
    if not encoders(pipeline) or not hasattr(pipeline, "load_textual_inversion"):
        raise ModelUnavailable(
            f"The model is a {kind}, which has no textual inversions. Only Stable Diffusion 1.x, 2.x and XL have. "
            "Start without --embedding."
        )
    load_weight_files(
        "--embedding",
        sources,
        lambda name, file: _load(pipeline, name, file),
        kind=kind,
        usual=_USUAL_FILE,
        download=download,
    )


def _load(pipeline: Any, name: str, file: Path) -> None:
    try:
        tensors = safetensors.torch.load_file(file)
    except Exception as error:
        raise ModelUnavailable(f"The file cannot be read ({first_line(error)}).") from error
    vectors = _fitting(pipeline, tensors)
    for (tokenizer, encoder), vector in zip(encoders(pipeline), vectors, strict=True):
        try:
            with quiet():
                pipeline.load_textual_inversion(
                    vector, token=name, tokenizer=getattr(pipeline, tokenizer), text_encoder=encoder
                )
        except ValueError as error:
            if "already in tokenizer vocabulary" not in str(error):
                raise ModelUnavailable(f"diffusers cannot read it ({first_line(error)}).") from error
            raise ModelUnavailable("It needs another name: the model already has a token with this one.") from error
        _find_end_by_id(encoder, getattr(pipeline, tokenizer))
    _log.info("embedding loaded", embedding=name, vectors=len(vectors[0]))


def _find_end_by_id(encoder: Any, tokenizer: Any) -> None:
    """Makes an encoder pool at its end token.

    With the wrong id 2 in their configs, older encoders pool at the token with the largest id. That was the end token,
    until the new tokens were added.
    """
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id


def _fitting(pipeline: Any, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns the vectors for each text encoder, (count, channels).

    Raises:
        ModelUnavailable: They do not fit the pipeline.
    """
    found = encoders(pipeline)
    if len(found) == 2:
        if not set(_XL_KEYS) <= tensors.keys():
            raise ModelUnavailable(
                "It was made for a model with one text encoder. This model has two: the file "
                f"needs the tensors {' and '.join(_XL_KEYS)}, but has {_names(tensors)}."
            )
        vectors = [tensors[key] for key in _XL_KEYS]
    elif set(_XL_KEYS) <= tensors.keys():
        raise ModelUnavailable("It was made for Stable Diffusion XL; this model is another one.")
    elif len(tensors) != 1:
        raise ModelUnavailable(f"It is no textual inversion: its file needs one tensor, but has {_names(tensors)}.")
    else:
        vectors = list(tensors.values())
    for vector, (_, encoder) in zip(vectors, found, strict=True):
        channels = encoder.get_input_embeddings().embedding_dim
        if vector.ndim not in (1, 2) or vector.shape[-1] != channels:
            raise ModelUnavailable(
                f"It was made for another model: its vectors have the shape {tuple(vector.shape)}, but this model's "
                f"have {channels} numbers each."
            )
    return [vector.reshape(-1, vector.shape[-1]) for vector in vectors]


def _names(tensors: Mapping[str, torch.Tensor]) -> str:
    names = sorted(tensors)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
