"""Which previews a caller wants."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "RENDERED_PREVIEW_METHODS",
    "PreviewMethod",
    "PreviewOptions",
]


class PreviewMethod(StrEnum):
    """How previews are rendered."""

    AUTO = "auto"
    """The best method that stays within the preview budget."""
    HEAD = "head"
    """A linear map fitted to the model at load, see `engine.preview.head`."""
    TINY_VAE = "tiny_vae"
    """A small decoder that the operator configured."""
    FULL_VAE = "full_vae"
    """The model's own decoder."""
    NONE = "none"
    """No previews."""


RENDERED_PREVIEW_METHODS = (PreviewMethod.HEAD, PreviewMethod.TINY_VAE, PreviewMethod.FULL_VAE)
"""The methods that render, cheapest first; AUTO chooses one of them."""


@dataclass(frozen=True, slots=True)
class PreviewOptions:
    """Size and frequency of previews.

    Attributes:
        every_steps: Steps between two previews, 1 to 1000. The last step always has one.
        min_interval: Minimum seconds between two previews, 0 to 60.
        max_edge: Maximum length of the longer edge, in pixels, at least 16.
        quality: JPEG quality, 1 to 95.
        method: How previews are rendered.
    """

    every_steps: int = 1
    min_interval: float = 0.0
    max_edge: int = 512
    quality: int = 75
    method: PreviewMethod = PreviewMethod.AUTO
