"""Blurs the previews of a model with a safety checker until the checker has approved the image.

A checker judges finished images, and its verdicts on early ones are unreliable. Previews are therefore small and
blurred until half of the steps are done. Then the predicted image is decoded in full and checked once; if it passes,
sharp previews follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
from torch.nn import functional

from calotype_server.engine.capabilities import decoder as pipeline_decoder

if TYPE_CHECKING:
    import torch

    from calotype_server.engine.preview.decoders import Decoder

__all__ = ["SafetyGate", "blurred", "safety_gate"]

_log = structlog.get_logger(__name__)

_BLURRED_EDGE = 24
"""Longer edge in pixels: enough for colours and a composition, too few to recognise anything."""


class SafetyGate:
    """Asks the safety checker of a pipeline.

    Args:
        pipeline: A pipeline with a safety checker, and a `run_safety_checker` like that of Stable Diffusion.
        decoder: Decodes the image to check: the full VAE.
    """

    def __init__(self, pipeline: Any, decoder: Decoder) -> None:
        self._pipeline = pipeline
        self._decoder = decoder

    def passes(self, latents: torch.Tensor, width: int, height: int) -> bool:
        """Returns whether the image may be shown. If the checker fails, it may not.

        Args:
            latents: Predicted x0 of one image.
            width: Of the image, in pixels.
            height: Of the image, in pixels.
        """
        try:
            image = self._decoder.decode(latents, width, height)
            _, flagged = self._pipeline.run_safety_checker(
                2 * image - 1, latents.device, pipeline_decoder(self._pipeline).dtype
            )
        except Exception:
            _log.exception("the safety checker failed; previews stay blurred")
            return False
        return flagged is not None and not any(flagged)


def safety_gate(pipeline: Any, decoder: Decoder) -> SafetyGate | None:
    """Returns the gate of a pipeline, or None if it has no safety checker."""
    return None if getattr(pipeline, "safety_checker", None) is None else SafetyGate(pipeline, decoder)


def blurred(images: torch.Tensor) -> torch.Tensor:
    """Returns small, smoothed versions of images, (batch, 3, rows, columns), that show little more than colours."""
    rows, columns = images.shape[-2:]
    reduction = max(1.0, max(rows, columns) / _BLURRED_EDGE)
    small = functional.adaptive_avg_pool2d(images, (max(1, int(rows / reduction)), max(1, int(columns / reduction))))
    return functional.avg_pool2d(functional.pad(small, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
