"""Quantizes the large models of a pipeline while their weights are read: `--quantize`.

Only linear layers are quantized, with one scale per row of weights (nf4: per block of 64). Activations are not: they
keep the number format of `--dtype`, so the rows of a batch do not affect each other. int8 and fp8 come from torchao,
nf4 from bitsandbytes.
"""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers

from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["check_quantize", "quantizable", "quantization_config"]

_PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
_FP8_CAPABILITY = (8, 9)
"""The first CUDA devices with 8-bit floating-point numbers."""

_SMALL_ENCODERS = ("CLIP", "Bert", "ChineseCLIP")
"""Text encoders, by the start of their class names, of which 8 bits would save less than half a gigabyte."""


def check_quantize(quantize: str, device: torch.device) -> None:
    """Checks that weights can be quantized here, before anything is read or downloaded.

    Args:
        quantize: Value of `--quantize`; empty for none.
        device: Where the model runs.

    Raises:
        ModelUnavailable: A package is missing, or the device lacks the number format. The message names the remedy.
    """
    if quantize and (problem := _problem(quantize, device)):
        raise ModelUnavailable(f"--quantize {quantize} {problem}, or start without it.")


def quantizable(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the components of a pipeline that are quantized: the denoiser, and large text encoders.

    A VAE or CLIP loses more quality than it saves memory.

    Args:
        index: The content of `model_index.json`: for each component the library and the class.
    """
    found = []
    for name, entry in index.items():
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or entry[0] is None:
            continue
        library, kind = entry
        is_denoiser = library == "diffusers" and name.startswith(("transformer", "unet"))
        is_encoder = library == "transformers" and name.startswith("text_encoder")
        if is_denoiser or (is_encoder and not kind.startswith(_SMALL_ENCODERS)):
            found.append(name)
    return tuple(found)


def quantization_config(quantize: str, dtype: torch.dtype, source: Path | str, **hub: Any) -> Any:
    """Returns the argument `quantization_config` of `from_pretrained`; None for none.

    Args:
        quantize: Value of `--quantize`; empty for none.
        dtype: Number format of the weights that are not quantized, and of computations.
        source: A folder or a hub id. Components that are already quantized there stay as they are.
        hub: Arguments of `from_pretrained` for downloads, such as `revision`.
    """
    if not quantize:
        return None
    index = diffusers.DiffusionPipeline.load_config(source, **hub)
    mapping = {
        name: _config(quantize, dtype, diffusers if index[name][0] == "diffusers" else transformers)
        for name in quantizable(index)
        if not _is_quantized(source, name)
    }
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping) if mapping else None


def _problem(quantize: str, device: torch.device) -> str | None:
    """Returns what the format needs and how to get it, as the end of a sentence; None if nothing is missing."""
    if quantize == "nf4" and device.type not in ("cuda", "xpu"):
        return f"needs a CUDA or XPU device, and the model is on {device}. Choose int8"
    if quantize == "fp8":
        if device.type == "mps":
            return "needs 8-bit floating-point numbers, which mps does not have. Choose int8"
        if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < _FP8_CAPABILITY:
            needed, own = (".".join(map(str, each)) for each in (_FP8_CAPABILITY, found))
            return f"needs a GPU of compute capability {needed}, and {device} has {own}. Choose int8"
    if importlib.util.find_spec(_PACKAGES[quantize]) is None:
        return "needs a package: pip install 'calotype[quantize]'. Install it"
    return None


def _config(quantize: str, dtype: torch.dtype, library: Any) -> Any:
    """Returns the configuration of one component in the form of its library, diffusers or transformers."""
    if quantize == "nf4":
        return library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    # Importing torchao takes seconds.
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig if quantize == "int8" else Float8WeightOnlyConfig
    # Otherwise torchao changes torch's global settings for compilers.
    return library.TorchAoConfig(kind(set_inductor_config=False))


def _is_quantized(source: Path | str, name: str) -> bool:
    """Whether a component of a folder is already quantized. In a hub's files, the libraries notice it and warn."""
    if isinstance(source, str):
        return False
    try:
        return "quantization_config" in json.loads((source / name / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # Loading reports it.
