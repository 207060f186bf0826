"""Loads textual inversions: embeddings of words that a text encoder was not trained with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import safetensors.torch
import structlog

from calotype_server.engine.loading.explain import explain, first_line
from calotype_server.engine.loading.quiet import quiet
from calotype_server.engine.prompts.support import encoders
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["load_embeddings"]

_log = structlog.get_logger(__name__)

_HUB_FILE = "learned_embeds.safetensors"
"""The file in a hub's repository, unless the operator names another one."""

_XL_KEYS = ("clip_l", "clip_g")
"""Keys of the embeddings for the two text encoders of Stable Diffusion XL, in the order of the encoders."""


def load_embeddings(pipeline: Any, sources: Mapping[str, str]) -> None:
    """Adds textual inversions to the tokenizers and text encoders of a pipeline.

    Args:
        pipeline: The loaded pipeline; changed, so it must not be in use yet.
        sources: FILE or HUB_ID[:FILE] of each embedding by its name, all as safetensors.

    Raises:
        ModelUnavailable: An embedding is missing, unreadable, or does not fit the model.
    """
    for name, source in sources.items():
        vectors = _fitting(pipeline, name, _read(name, source))
        for (tokenizer, encoder), vector in zip(encoders(pipeline), vectors, strict=True):
            try:
                with quiet():
                    pipeline.load_textual_inversion(
                        vector, token=name, tokenizer=getattr(pipeline, tokenizer), text_encoder=encoder
                    )
            except ValueError as error:
                if "already in tokenizer vocabulary" not in str(error):
                    raise ModelUnavailable(f"The embedding {name!r} cannot be loaded ({first_line(error)}).") from error
                raise ModelUnavailable(
                    f"The embedding {name!r} needs another name: the model already has a token with this one."
                ) from error
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


def _read(name: str, source: str) -> dict[str, torch.Tensor]:
    """Returns the tensors in a file."""
    path = Path(source).expanduser()
    if not (path.exists() or source.startswith((".", "/", "~"))):
        repository, _, file = source.partition(":")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", repository) and Path(repository).suffix != ".safetensors":
            path = _downloaded(name, repository, file or _HUB_FILE)
    if path.suffix != ".safetensors":
        raise ModelUnavailable(
            f"The embedding {name!r} is {source!r}, which is not a .safetensors file. Other formats can contain code."
        )
    if not path.is_file():
        raise ModelUnavailable(f"The embedding {name!r} is {source!r}, which does not exist.")
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:
        raise ModelUnavailable(f"The embedding {name!r} cannot be read ({first_line(error)}).") from error


def _downloaded(name: str, repository: str, file: str) -> Path:
    if not file.endswith(".safetensors"):
        raise ModelUnavailable(f"The embedding {name!r} is {file!r}, which is not a .safetensors file.")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:
        raise ModelUnavailable(f"The embedding {name!r}: {explain(repository, repository, error)}") from error


def _fitting(pipeline: Any, name: str, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns the vectors for each text encoder, (count, channels).

    Raises:
        ModelUnavailable: They do not fit the pipeline.
    """
    found = encoders(pipeline)
    if not found or not hasattr(pipeline, "load_textual_inversion"):
        kind = type(pipeline).__name__
        raise ModelUnavailable(
            f"The embedding {name!r} cannot be used: a {kind} has no textual inversions. "
            "Only Stable Diffusion 1.x, 2.x and XL have."
        )
    if len(found) == 2:
        if not set(_XL_KEYS) <= tensors.keys():
            raise ModelUnavailable(
                f"The embedding {name!r} was made for a model with one text encoder. This model has two: the file "
                f"needs the tensors {' and '.join(_XL_KEYS)}, but has {_names(tensors)}."
            )
        vectors = [tensors[key] for key in _XL_KEYS]
    elif set(_XL_KEYS) <= tensors.keys():
        raise ModelUnavailable(f"The embedding {name!r} was made for Stable Diffusion XL; this model is another one.")
    elif len(tensors) != 1:
        raise ModelUnavailable(
            f"The embedding {name!r} is no textual inversion: its file needs one tensor, but has {_names(tensors)}."
        )
    else:
        vectors = list(tensors.values())
    for vector, (_, encoder) in zip(vectors, found, strict=True):
        channels = encoder.get_input_embeddings().embedding_dim
        if vector.ndim not in (1, 2) or vector.shape[-1] != channels:
            raise ModelUnavailable(
                f"The embedding {name!r} was made for another model: its vectors have the shape "
                f"{tuple(vector.shape)}, but this model's have {channels} numbers each."
            )
    return [vector.reshape(-1, vector.shape[-1]) for vector in vectors]


def _names(tensors: Mapping[str, torch.Tensor]) -> str:
    names = sorted(tensors)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
