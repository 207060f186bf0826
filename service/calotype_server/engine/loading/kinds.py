"""Recognises the kind of model in a single file, from the names and shapes of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers.loaders import single_file_utils

from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

__all__ = ["PIPELINES", "has_only_denoiser", "recognised_kind", "usual_source"]

PIPELINES = {
    "auraflow": "AuraFlowPipeline",
    "chroma": "ChromaPipeline",
    "cosmos-2.0-t2i-14B": "Cosmos2TextToImagePipeline",
    "cosmos-2.0-t2i-2B": "Cosmos2TextToImagePipeline",
    "flux-2-dev": "Flux2Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "hidream": "HiDreamImagePipeline",
    "krea2": "Krea2Pipeline",
    "lumina2": "Lumina2Pipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sana": "SanaPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "z-image-turbo": "ZImagePipeline",
}
"""Pipeline classes of the kinds that turn text into images, by the names that diffusers gives the kinds."""

_CLIP = "cond_stage_model."
"""Start of the names of a text encoder's weights in Stable Diffusion 1 and 2, for which diffusers takes every file that
it does not know. A file with only a UNet may also be of Stable Diffusion XL."""

_OTHER_PARTS = ("cond_stage_model.", "conditioner.", "first_stage_model.", "text_encoders.", "vae.")
"""Starts of the names of weights that do not belong to the denoiser."""

_SCALED = ("scaled_fp8", "scale_weight", "weight_scale")
"""Ends of the names of scales that other programs store beside 8-bit weights; diffusers would ignore them."""


def recognised_kind(file: Path, shapes: Mapping[str, torch.Tensor]) -> str | None:
    """Returns the kind of model, a key of `PIPELINES`, or None if diffusers does not know it.

    Raises:
        ModelUnavailable: It is a LoRA, does not turn text into images, or stores its weights in a way that is not
            supported.
    """
    if shapes and all("lora" in name or name.endswith("alpha") for name in shapes):
        raise ModelUnavailable(
            f"{str(file)!r} is a LoRA and not a model. Name the model that it was made for with --model, and this file "
            "with --lora NAME=FILE."
        )
    if any(name.endswith(_SCALED) for name in shapes):
        raise ModelUnavailable(
            f"{str(file)!r} has 8-bit weights with separate scales, which diffusers cannot read. Use the file with "
            "bfloat16 or float16 weights, or a .gguf file."
        )
    try:
        kind = str(single_file_utils.infer_diffusers_model_type(shapes))
    except Exception:  # It compares shapes, and values of a ControlNet, that may be missing.
        return None
    if kind == "v1" and not any(name.startswith(_CLIP) for name in shapes):
        return None
    if kind not in PIPELINES:
        raise ModelUnavailable(f"{str(file)!r} has a model of the kind {kind!r}, which does not turn text into images.")
    return kind


def usual_source(kind: str) -> str:
    """Returns the hub id of the model whose configs diffusers uses for a kind."""
    return str(single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def has_only_denoiser(shapes: Mapping[str, Any]) -> bool:
    """Returns whether a file has no weights of a decoder or a text encoder."""
    return not any(name.startswith(_OTHER_PARTS) for name in shapes)
