"""Images, encoded and not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = [
    "EncodedImage",
    "ImageFormat",
    "Pixels",
]

ImageFormat: TypeAlias = Literal["jpeg", "png", "webp"]
"""File format of an image."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """An uncompressed image: `height` rows of `width` RGB pixels, one byte per channel."""

    width: int
    height: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A complete image file; width and height are in pixels."""

    format: ImageFormat
    width: int
    height: int
    data: bytes = field(repr=False)
