"""Reads the names of a LoRA file's tensors, to refuse files whose effect would be wrong, with the reason."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import safetensors

from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LoraHeader", "read_header"]

_OTHER_KINDS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "hada_w": "a LoHa",
    "lokr_w": "a LoKr",
    "oft_": "an OFT",
    "lora_controlnet": "a Control-LoRA",
}
"""Parts of tensor names, and the kinds of adapters that have them. diffusers drops or ignores some of these tensors, so
that the image would be wrong instead of missing."""

_MADE_FOR = ("modelspec.architecture", "ss_base_model_version")
"""Entries of the metadata, best first, that name the model that a LoRA was made for."""


@dataclass(frozen=True, slots=True)
class LoraHeader:
    """Facts that a LoRA file states about itself.

    Attributes:
        made_for: Name of the kind of model that it was made for; empty if it does not say.
        tensor_count: Number of its tensors that are weights or biases.
        factor: Factor of its effect that only the `adapter_config.json` beside it has: alpha over rank.
    """

    made_for: str
    tensor_count: int
    factor: float


def read_header(path: Path) -> LoraHeader:
    """Reads the header of a file.

    Raises:
        ModelUnavailable: The file is damaged, is no LoRA, or is an adapter of another kind.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
    except Exception as error:
        raise ModelUnavailable("The file is damaged: its safetensors header cannot be read.") from error
    for part, kind in _OTHER_KINDS.items():
        if any(part in name for name in names):
            raise ModelUnavailable(f"The file is {kind}; only LoRAs are supported.")
    weights = [name for name in names if not re.search(r"(\.|_)alpha$", name)]
    if not any("lora" in name for name in weights):
        raise ModelUnavailable("The file is not a LoRA: none of its tensors has 'lora' in its name.")
    made_for = next((metadata[name] for name in _MADE_FOR if metadata.get(name)), "")
    own_factors = len(weights) < len(names) or "lora_adapter_metadata" in metadata
    return LoraHeader(made_for[:80], len(weights), 1.0 if own_factors else _peft_factor(path))


def _peft_factor(path: Path) -> float:
    """Returns the factor for a file of peft, which keeps it in a second file that diffusers does not read."""
    try:
        config = json.loads(path.with_name("adapter_config.json").read_bytes())
        alpha, rank = float(config["lora_alpha"]), int(config["r"])
    except FileNotFoundError:
        return 1.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable("The adapter_config.json beside the file is damaged.") from error
    if config.get("use_dora"):
        raise ModelUnavailable("The file is a DoRA; only LoRAs are supported.")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ModelUnavailable("Its adapter_config.json has different factors for its layers, which is not supported.")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
