"""Ends a generation early: the predicted picture of a step, decoded in full by the pipeline's own tail."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.preview.decoders import VaeDecoder
from calotype_server.engine.preview.safety_gate import SafetyGate

if TYPE_CHECKING:
    from calotype_server.engine.tap import Step

__all__ = ["Finisher"]


class Finisher:
    """Decodes for one generation at a time, in the generation's own thread.

    Args:
        pipeline: One that may be used while requests run; not changed.
    """

    def __init__(self, pipeline: Any) -> None:
        self._lock = threading.Lock()
        self._decoder = VaeDecoder(pipeline, pipeline.vae)
        self._gate = SafetyGate(pipeline, self._decoder) if SafetyGate.needed(pipeline) else None

    @torch.no_grad()
    def decode(self, step: Step, width: int, height: int) -> torch.Tensor | None:
        """Returns the picture, (1, 3, height, width) from 0 to 1, or None when the safety checker objects.

        Args:
            step: One with a predicted x0.
            width: In pixels.
            height: In pixels.
        """
        x0 = step.x0()
        assert x0 is not None
        with self._lock:
            if self._gate is not None and not self._gate.passes(x0, width, height):
                return None
            return self._decoder.decode(x0, width, height)
