"""Estimates the memory that a denoiser and a VAE need while they compute, from their configurations.

A UNet and a VAE run with tensors that have a shape but no values, so that the estimate counts the tensors that torch
would make. Transformers differ too much in their arguments; for them, it is proportional to the number of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import structlog
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from calotype_server.engine.memory import peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["decoding_bytes", "denoising_bytes", "native_edge"]

_log = structlog.get_logger(__name__)

_GUIDED_ROWS = 2
"""One row with the prompt and one without."""

_CLIP_TOKENS = 77
_TEXT_TOKENS = 512
"""Of T5 and language models, at most, by default."""

_HIDDEN_COPIES = 16
"""Tensors of the size of all tokens that exist at the same time in a block of a transformer, at most: two blocks of
FLUX.1, Stable Diffusion 3.5 and PixArt-Sigma without values needed 15, 11 and 12."""

_CPU = torch.device("cpu")


def native_edge(denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Returns the default edge of images in pixels; 1024 if the configurations do not say it."""
    size = denoiser.get("sample_size") or 128
    return (max(size) if isinstance(size, (list, tuple)) else int(size)) * _pixels_per_latent(vae)


def denoising_bytes(denoiser: Mapping[str, Any], vae: Mapping[str, Any], edge: int, dtype: torch.dtype) -> int | None:
    """Returns the bytes of one call of the denoiser for a request with guidance; None if that is unknown.

    Args:
        denoiser: Its configuration.
        vae: Configuration of the VAE.
        edge: Of the image, in pixels.
        dtype: Number format of computations.
    """
    latents = max(1, edge // _pixels_per_latent(vae))
    if denoiser.get("_class_name") == "UNet2DConditionModel":
        return _unet_bytes(denoiser, latents, dtype)
    hidden = _hidden(denoiser)
    if hidden is None:
        return None
    # Pipelines of models without a patch size above 1, such as FLUX.1, pack 2 x 2 latents into a token.
    packed = denoiser.get("in_channels", 0) >= 4 * _latent_channels(vae)
    patch = denoiser.get("patch_size", 1)
    patch = 2 if packed else (patch[-1] if isinstance(patch, (list, tuple)) else int(patch or 1))
    tokens = (latents // patch) ** 2 + _TEXT_TOKENS
    return _rows(denoiser) * tokens * hidden * dtype.itemsize * _HIDDEN_COPIES


def decoding_bytes(vae: Mapping[str, Any], edge: int, dtype: torch.dtype) -> int | None:
    """Returns the bytes of decoding one image, with the image; None if that is unknown.

    Args:
        vae: Configuration of the VAE.
        edge: Of the image, in pixels.
        dtype: Number format of computations.
    """
    latents = max(1, edge // _pixels_per_latent(vae))
    # VAEs of video models have a dimension for frames.
    shape = (1, _latent_channels(vae), *((1,) if "z_dim" in vae else ()), latents, latents)
    # Pipelines convert VAEs that overflow in float16.
    value_bytes = torch.float32.itemsize if vae.get("force_upcast") else dtype.itemsize

    def prepare(model: Any) -> Callable[[], Any]:
        sample = torch.empty(shape)
        return lambda: model.decode(sample, return_dict=False)

    return _peak(vae, prepare, value_bytes)


def _unet_bytes(config: Mapping[str, Any], latents: int, dtype: torch.dtype) -> int | None:
    def prepare(model: Any) -> Callable[[], Any]:
        rows, width = _rows(config), config["cross_attention_dim"]
        sample = torch.empty(rows, config["in_channels"], latents, latents)
        text = torch.empty(rows, _CLIP_TOKENS, width[0] if isinstance(width, list) else width)
        added = None
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.empty(rows, pooled), "time_ids": torch.empty(rows, 6)}
        return lambda: model(sample, 1, text, added_cond_kwargs=added, return_dict=False)

    return _peak(config, prepare, dtype.itemsize)


def _peak(config: Mapping[str, Any], prepare: Callable[[Any], Callable[[], Any]], value_bytes: int) -> int | None:
    """Returns the bytes of a call of a model without values; None if it fails.

    Args:
        config: Configuration of the model.
        prepare: Receives the model, and returns a function that calls it with arguments made before.
        value_bytes: Bytes of a value in the real model. The one without values has 4 for each.
    """
    try:
        with FakeTensorMode(), torch.no_grad():
            model = getattr(diffusers, config["_class_name"]).from_config(dict(config)).eval()
            return peak_memory(prepare(model), _CPU) * value_bytes // torch.float32.itemsize
    except Exception as error:  # For any reason: the configuration may belong to another version.
        _log.debug("cannot estimate", model=config.get("_class_name"), exc_info=error)
        return None


def _rows(denoiser: Mapping[str, Any]) -> int:
    """Returns the rows of a request with guidance: one for models that get the scale as an argument."""
    return 1 if denoiser.get("guidance_embeds") or denoiser.get("time_cond_proj_dim") else _GUIDED_ROWS


def _hidden(config: Mapping[str, Any]) -> int | None:
    """Returns the number of values of a token inside a transformer."""
    for name in ("hidden_size", "inner_dim", "dim"):
        if isinstance(config.get(name), int):
            return int(config[name])
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    return heads * width if isinstance(heads, int) and isinstance(width, int) else None


def _latent_channels(vae: Mapping[str, Any]) -> int:
    return int(vae.get("latent_channels") or vae.get("z_dim") or 4)


def _pixels_per_latent(vae: Mapping[str, Any]) -> int:
    """Returns the pixels along an edge that one latent stands for."""
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or vae.get("dim_mult")
    return 8 if levels is None else int(2 ** (len(levels) - 1))
