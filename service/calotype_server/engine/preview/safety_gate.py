"""Keeps previews of a model with a safety checker harmless until the checker has seen the picture.

A checker judges finished pictures, and misfires on early ones. So previews are shown small and blurred until half of
the steps are done; then the predicted picture is decoded in full and checked once; sharp previews follow if it passed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
from torch.nn import functional

if TYPE_CHECKING:
    import torch

    from calotype_server.engine.preview.decoders import Decoder

__all__ = ["SafetyGate", "blurred"]

_log = structlog.get_logger(__name__)

_BLURRED_EDGE = 24
"""Longer edge in pixels: colours and a composition, nothing to recognise."""


class SafetyGate:
    """The checker of a pipeline.

    Args:
        pipeline: One with a safety checker, and a `run_safety_checker` as Stable Diffusion has it.
        decoder: Draws what is checked: the full VAE.
    """

    def __init__(self, pipeline: Any, decoder: Decoder) -> None:
        self._pipeline = pipeline
        self._decoder = decoder

    @staticmethod
    def needed(pipeline: Any) -> bool:
        """Whether the pipeline has a checker."""
        return getattr(pipeline, "safety_checker", None) is not None

    def passes(self, latents: torch.Tensor, width: int, height: int) -> bool:
        """Whether the picture of these latents may be shown. A checker that fails lets nothing pass.

        Args:
            latents: Predicted x0 of one picture.
            width: Of the picture, in pixels.
            height: Of the picture, in pixels.
        """
        try:
            picture = self._decoder.decode(latents, width, height)
            _, objections = self._pipeline.run_safety_checker(2 * picture - 1, latents.device, self._pipeline.vae.dtype)
        except Exception:
            _log.exception("the safety checker failed; previews stay blurred")
            return False
        return objections is not None and not any(objections)


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    """Returns pictures, (batch, 3, rows, columns), that tell no more than colours: small, and smoothed."""
    rows, columns = pictures.shape[-2:]
    reduction = max(1.0, max(rows, columns) / _BLURRED_EDGE)
    small = functional.adaptive_avg_pool2d(pictures, (max(1, int(rows / reduction)), max(1, int(columns / reduction))))
    return functional.avg_pool2d(functional.pad(small, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
