"""Checks the LoRAs of a request."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from calotype_server.limits import LORA_SCALE_MAX, LORAS_MAX
from calotype_server.types import Lora

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype.v1 import calotype_pb2 as pb
    from calotype_server.types import ModelInfo

__all__ = ["chosen_loras"]


def chosen_loras(request: pb.GenerateRequest, model: ModelInfo, reject: Callable[[str, str], None]) -> tuple[Lora, ...]:
    """Returns the LoRAs that a request chooses; rejects unknown names, repeated ones, and scales out of range.

    Args:
        request: The request of the caller.
        model: The loaded model.
        reject: Adds a violation: the name of the field and a description.
    """
    if not request.loras:
        return ()
    if not model.loras:
        reject("loras", "cannot be used: this server has no LoRAs. The operator can load some with --lora")
        return ()
    if len(request.loras) > LORAS_MAX:
        reject("loras", f"has {len(request.loras)} entries, the maximum is {LORAS_MAX}")
        return ()
    chosen: dict[str, Lora] = {}
    for number, lora in enumerate(request.loras):
        scale = lora.scale if lora.HasField("scale") else 1.0
        if lora.name not in model.loras:
            reject(f"loras.{number}.name", f"{lora.name[:80]!r} is unknown, must be one of {', '.join(model.loras)}")
        elif lora.name in chosen:
            reject(f"loras.{number}.name", f"{lora.name!r} is chosen twice")
        if not (math.isfinite(scale) and -LORA_SCALE_MAX <= scale <= LORA_SCALE_MAX):
            reject(f"loras.{number}.scale", f"is {scale:g}, must be {-LORA_SCALE_MAX:g} to {LORA_SCALE_MAX:g}")
        chosen[lora.name] = Lora(lora.name, scale)
    return tuple(chosen.values())
