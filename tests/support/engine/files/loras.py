"""Files of LoRAs with random weights, in the formats of several trainers."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import peft
import safetensors.torch
import torch
from peft.utils import get_peft_model_state_dict

from calotype_server.engine.capabilities import denoiser_name

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ATTENTION", "kohya_lora", "lora_weights", "save_lora"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")


def lora_weights(
    pipeline: Any,
    component: str,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: tuple[str, ...] | None = None,
    size: float = 0.1,
) -> dict[str, torch.Tensor]:
    """Returns the weights of a LoRA for a component, with peft's names.

    Args:
        pipeline: Not changed.
        component: Such as "unet" or "text_encoder".
        seed: Of the weights.
        rank: Of every layer.
        targets: Ends of the names of the layers. None: the attention.
        size: Standard deviation of the weights.
    """
    if targets is None:
        targets = _CLIP if component.startswith("text_encoder") else ATTENTION
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=False)
    module = copy.deepcopy(getattr(pipeline, component))
    peft.inject_adapter_in_model(config, module)
    weights = get_peft_model_state_dict(module)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (size * torch.randn(tensor.shape, generator=generator)).contiguous()
        for name, tensor in sorted(weights.items())
    }


def save_lora(
    path: Path, pipeline: Any, *, components: tuple[str, ...] | None = None, metadata: Any = None, **options: Any
) -> Path:
    """Saves a LoRA for components of a pipeline, by default its denoiser, with the names of diffusers.

    Args:
        path: The file.
        pipeline: Not changed.
        components: Names of the components that it changes.
        metadata: Metadata of the file.
        options: For `lora_weights`.
    """
    weights = {
        f"{component}.{name}": tensor
        for component in components or (denoiser_name(pipeline),)
        for name, tensor in lora_weights(pipeline, component, **options).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, path, metadata)
    return path


def kohya_lora(path: Path, pipeline: Any, *, alpha: float, metadata: Any = None, **options: Any) -> Path:
    """Saves a LoRA for UNet and text encoder with the names of kohya's scripts, which most LoRAs on the web have."""
    weights = {}
    for component, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te")):
        for name, tensor in lora_weights(pipeline, component, **options).items():
            layer, part = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name).groups()
            layer = layer if component == "unet" or layer.startswith("text_model") else f"text_model.{layer}"
            key = f"{prefix}_{layer.replace('.', '_')}"
            weights[f"{key}.lora_{'down' if part == 'A' else 'up'}.weight"] = tensor
            weights[f"{key}.alpha"] = torch.tensor(float(alpha))
    safetensors.torch.save_file(weights, path, metadata)
    return path
