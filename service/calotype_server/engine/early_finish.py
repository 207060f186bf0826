"""Ends a generation early: decodes the predicted image of a step in full, with the pipeline's own tail."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.capabilities import decoder
from calotype_server.engine.preview.decoders import VaeDecoder
from calotype_server.engine.preview.safety_gate import safety_gate

if TYPE_CHECKING:
    from calotype_server.engine.tap import Step

__all__ = ["EarlyFinisher"]


class EarlyFinisher:
    """Decodes for one generation at a time, in the generation's own thread.

    Args:
        pipeline: A pipeline that is safe to use while requests run; not changed.
    """

    def __init__(self, pipeline: Any) -> None:
        self._lock = threading.Lock()
        self._decoder = VaeDecoder(pipeline, decoder(pipeline))
        self._gate = safety_gate(pipeline, self._decoder)

    @torch.no_grad()
    def decode(self, step: Step, width: int, height: int) -> torch.Tensor | None:
        """Returns the image, (1, 3, height, width), 0 to 1, or None if the safety checker rejects it.

        Args:
            step: A step with a predicted x0.
            width: Of the image, in pixels.
            height: Of the image, in pixels.
        """
        x0 = step.x0()
        assert x0 is not None
        with self._lock:
            if self._gate is not None and not self._gate.passes(x0, width, height):
                return None
            return self._decoder.decode(x0, width, height)
