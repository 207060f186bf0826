"""Writes PNG files of RGB images, about ten times as fast as Pillow and hardly larger.

Two things make the difference: one filter for all rows, which numpy computes at once, and ISA-L's deflate. Both release
the interpreter lock while they work. Source: the PNG specification, third edition (https://www.w3.org/TR/png-3/).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
from isal import isal_zlib

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from calotype_server.types import Pixels

__all__ = ["encode_png"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_BIT_DEPTH = 8
_COLOUR_TYPE_RGB = 2
_CHANNELS = 3

_FILTER_UP = 2
"""Each byte is stored as its difference from the byte above it.

Choosing the best filter for each row takes ten times as long and saves few bytes. "Sub" and "Average" give larger files
for smooth images.
"""

_LEVEL = 1
"""Of 0 to 3. Levels 2 and 3 take longer, and give the same size or a larger one."""

_MAX_CHUNK_BYTES = 1 << 20
"""Libpng rejects chunks above 8 MB by default."""


def encode_png(pixels: Pixels, texts: Mapping[str, str]) -> bytes:
    """Returns a PNG file. The same pixels and texts give the same bytes on equal machines.

    Args:
        pixels: The image, at least 1 x 1 pixel.
        texts: Text chunks (iTXt, uncompressed) by keyword: 1 to 79 characters of Latin-1.
    """
    header = struct.pack(">IIBBBBB", pixels.width, pixels.height, _BIT_DEPTH, _COLOUR_TYPE_RGB, 0, 0, 0)
    parts: list[bytes | memoryview] = [_SIGNATURE, *_chunk(b"IHDR", header)]
    for keyword, text in texts.items():
        # After the keyword: no compression, compression method 0, no language, no translated keyword.
        parts += _chunk(b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode())
    data = memoryview(isal_zlib.compress(_filtered(pixels), _LEVEL))
    for start in range(0, len(data), _MAX_CHUNK_BYTES):
        parts += _chunk(b"IDAT", data[start : start + _MAX_CHUNK_BYTES])
    return b"".join([*parts, *_chunk(b"IEND", b"")])


def _filtered(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Returns the rows of the image, filtered: the number of the filter, then the row's bytes."""
    rows = np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width * _CHANNELS)
    filtered = np.empty((pixels.height, 1 + pixels.width * _CHANNELS), np.uint8)
    filtered[:, 0] = _FILTER_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as the filter requires
    return filtered


def _chunk(kind: bytes, data: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
    """Returns the parts of a chunk: length, type, data and the CRC of type and data."""
    crc = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return struct.pack(">I", len(data)), kind, data, struct.pack(">I", crc)
