"""Puts a loaded pipeline on its device, or lets its weights move there when they are needed: `--offload`.

This has not been tried on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import apply_group_offloading

from calotype_server.errors import ModelUnavailable

__all__ = ["check_offload", "place"]


def check_offload(offload: str, device: torch.device, quantize: str = "") -> None:
    """Checks that weights can move between this device and ordinary memory.

    Args:
        offload: Value of `--offload`; empty for none.
        device: Where the model runs.
        quantize: Value of `--quantize`; empty for none.

    Raises:
        ModelUnavailable: They cannot.
    """
    if not offload:
        return
    if device.type not in ("cuda", "xpu"):
        raise ModelUnavailable(
            f"--offload {offload} keeps weights in ordinary memory until a GPU needs them; the model is on {device}. "
            "Choose a GPU with --device, or start without it."
        )
    if offload == "group" and quantize == "nf4":
        raise ModelUnavailable(
            "--offload group cannot move weights of --quantize nf4. Use --offload model, or --quantize int8."
        )


def place(pipeline: Any, offload: str, device: torch.device) -> None:
    """Moves a pipeline to its device, or adds the hooks that move its weights.

    Args:
        pipeline: Loaded, in ordinary memory.
        offload: "model": one model at a time is on the device. "group": the denoiser's blocks and the layers of text
            encoders are on the device only while they compute; everything else stays there. Empty: everything does.
        device: Where the model runs.

    Raises:
        ModelUnavailable: The pipeline does not support it.
    """
    try:
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "group":
            _offload_groups(pipeline, device)
        else:
            pipeline.to(device)
    except ValueError as error:
        if not offload:
            raise
        kind = type(pipeline).__name__
        raise ModelUnavailable(f"A {kind} does not support --offload {offload}. Start without it.") from error


def _offload_groups(pipeline: Any, device: torch.device) -> None:
    for name, component in pipeline.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        options: dict[str, Any] = {"onload_device": device, "offload_device": torch.device("cpu")}
        if name.startswith(("transformer", "unet")):
            options |= {"offload_type": "block_level", "num_blocks_per_group": 1}
        elif name.startswith("text_encoder"):
            # Pipelines also call parts of a text encoder, which hooks of whole blocks would not see.
            options |= {"offload_type": "leaf_level"}
        else:
            component.to(device)
            continue
        # Models of diffusers know whether they support it.
        enable = getattr(component, "enable_group_offload", None)
        if enable is not None:
            enable(**options)
        else:
            apply_group_offloading(component, **options)
