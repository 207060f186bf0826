"""Composes several images to one: previews and the final image side by side, or the images of a group in a grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import PIL.Image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .._image import Image

__all__ = ["compose", "grid", "pick_evenly"]

_MAX_EDGE = 256
_GAP = 8


def pick_evenly(frames: Sequence[Image], count: int = 8) -> list[Image]:
    """Picks at most `count` frames at equal distances, including the first and the last."""
    if len(frames) <= count:
        return list(frames)
    return [frames[round(index * (len(frames) - 1) / (count - 1))] for index in range(count)]


def compose(frames: Sequence[Image]) -> PIL.Image.Image:
    """Puts frames side by side. All get the size of the last one, scaled down to at most 256 x 256 pixels."""
    pictures = [frame.to_pil().convert("RGB") for frame in frames]
    width, height = pictures[-1].size
    scale = min(1.0, _MAX_EDGE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    strip = PIL.Image.new("RGBA", (len(pictures) * (size[0] + _GAP) - _GAP, size[1]))
    for index, picture in enumerate(pictures):
        strip.paste(picture.resize(size, PIL.Image.Resampling.LANCZOS), (index * (size[0] + _GAP), 0))
    return strip


def grid(pictures: Mapping[int, PIL.Image.Image], count: int) -> PIL.Image.Image:
    """Puts pictures of the same shape into a grid of `count` cells, in reading order. Cells without one are empty."""
    columns = math.ceil(math.sqrt(count))
    width = max(picture.width for picture in pictures.values())
    height = max(picture.height for picture in pictures.values())
    gap = max(1, width // 32)
    size = columns * (width + gap) - gap, math.ceil(count / columns) * (height + gap) - gap
    whole = PIL.Image.new("RGB", size)
    for index, picture in pictures.items():
        scaled = picture.convert("RGB").resize((width, height), PIL.Image.Resampling.BILINEAR)
        whole.paste(scaled, (index % columns * (width + gap), index // columns * (height + gap)))
    return whole
