"""LoRAs that requests apply."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Lora"]


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA and its strength.

    Attributes:
        name: One of `ModelInfo.loras`.
        scale: Factor of its weights, -10 to 10.
    """

    name: str
    scale: float = 1.0
