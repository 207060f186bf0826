"""Reads how a pipeline keeps its weights: quantized, or outside of the device."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["moves_layers", "offload_of", "quantization_of"]


def quantization_of(pipeline: Any) -> str:
    """Returns the format of the quantized weights: of the denoiser, or else of a text encoder; empty if there are none.

    It is "int8", "fp8", "int4", "nf4" or "fp4" if the library says so, or else the name of the library, such as "gguf".
    Folders can hold weights that were quantized when they were saved.
    """
    components = sorted(pipeline.components.items(), key=lambda each: not each[0].startswith(("transformer", "unet")))
    for _, component in components:
        found = _format(getattr(component, "hf_quantizer", None))
        if found:
            return found
    return ""


def offload_of(pipeline: Any, denoiser: Any) -> str:
    """Returns how weights move between the device and the host: "model", "group", or empty if they do not.

    Args:
        pipeline: The loaded pipeline.
        denoiser: Its transformer or UNet.
    """
    if getattr(pipeline, "_all_hooks", None):
        return "model"
    return "group" if moves_layers(denoiser) else ""


def moves_layers(module: Any) -> bool:
    """Whether hooks of diffusers move layers of a module to the device, each for its own call."""
    return isinstance(module, torch.nn.Module) and any(
        "group_offloading" in getattr(getattr(part, "_diffusers_hook", None), "hooks", {}) for part in module.modules()
    )


def _format(quantizer: Any) -> str:
    config = getattr(quantizer, "quantization_config", None)
    if config is None:
        return ""
    if getattr(config, "load_in_8bit", False):
        return "int8"
    if getattr(config, "load_in_4bit", False):
        return str(config.bnb_4bit_quant_type)
    # torchao's class names begin with the format, such as `Int8WeightOnlyConfig`.
    kind = type(getattr(config, "quant_type", None)).__name__
    for start, name in (("Int8", "int8"), ("Float8", "fp8"), ("Int4", "int4")):
        if kind.startswith(start):
            return name
    method = config.quant_method
    return str(getattr(method, "value", method))
