"""Draws images in a terminal: with sixel or kitty graphics if it has them, otherwise with half blocks."""

from __future__ import annotations

import logging
import os
import re
import select
import sys
from typing import TYPE_CHECKING, Literal

import PIL.Image
from rich.color import Color
from rich.segment import Segment
from rich.style import Style

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

__all__ = ["HalfBlocks", "Protocol", "detect_protocol", "picture_renderer"]

Protocol = Literal["sixel", "kitty", "blocks"]

_ANSWER_SECONDS = 0.3
_DEVICE_ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")
_CELL_RATIO = 2.0  # most fonts: a cell is about twice as high as it is wide


def detect_protocol() -> Protocol:
    """Finds out how the terminal draws images. Switch echo off first: the terminal answers as if typing."""
    if os.environ.get("TERM", "") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    return "sixel" if "4" in _device_attributes() else "blocks"


def _device_attributes() -> list[str]:
    """Asks for the terminal's primary attributes (DA1). Nearly every terminal answers; waits up to 0.3 s."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or sys.platform == "win32":
        return []
    sys.stdout.write("\x1b[c")
    sys.stdout.flush()
    answer, descriptor = b"", sys.stdin.fileno()
    while select.select([descriptor], [], [], _ANSWER_SECONDS)[0]:
        piece = os.read(descriptor, 64)
        answer += piece
        if match := _DEVICE_ATTRIBUTES.search(answer):
            return match[1].decode().split(";")
        if not piece:
            break
    return []


def picture_renderer(protocol: Protocol) -> Callable[[PIL.Image.Image, int, int], RenderableType]:
    """Returns a function that renders an image in at most the given number of columns and rows."""
    if protocol == "blocks":
        return HalfBlocks
    # textual_image queries the terminal on import, and leaves the query on the screen when there is no answer.
    namespace, logger = vars(sys), logging.getLogger("textual_image")
    stdout, namespace["__stdout__"] = sys.__stdout__, None
    logger.setLevel(logging.ERROR)
    try:
        from textual_image.renderable import SixelImage, TGPImage
    finally:
        namespace["__stdout__"] = stdout
    kind = SixelImage if protocol == "sixel" else TGPImage

    def render(image: PIL.Image.Image, columns: int, rows: int) -> RenderableType:
        picture: RenderableType = kind(image, *_fit(image.width, image.height, columns, rows))
        return picture

    return render


def _fit(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """Returns the largest size in cells that keeps the aspect ratio."""
    scale = min(columns / width, rows * _CELL_RATIO / height)
    return max(1, round(width * scale)), max(1, round(height * scale / _CELL_RATIO))


class HalfBlocks:
    """An image drawn with upper half blocks, two pixels per cell."""

    def __init__(self, picture: PIL.Image.Image, columns: int, rows: int) -> None:
        columns, rows = _fit(picture.width, picture.height, columns, rows)
        self._pixels = picture.convert("RGB").resize((columns, rows * 2), PIL.Image.Resampling.BOX)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, height = self._pixels.size
        data = self._pixels.tobytes()
        for top in range(0, height, 2):
            for column in range(columns):
                upper, lower = (3 * ((top + half) * columns + column) for half in (0, 1))
                yield Segment(
                    "▀", Style(color=_colour(data[upper : upper + 3]), bgcolor=_colour(data[lower : lower + 3]))
                )
            yield Segment.line()


def _colour(pixel: bytes) -> Color:
    return Color.from_rgb(*pixel)
