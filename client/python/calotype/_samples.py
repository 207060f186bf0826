"""Tiny valid pictures, made without an image library, for `calotype.testing`."""

from __future__ import annotations

import base64
import struct
import zlib

from ._types import Image

__all__ = ["make_png", "sample_jpeg"]

_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8"
    "ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKT/wAAR"
    "CAAQABADASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAABAX/xAAXEAADAQAAAAAAAAAAAAAAAAAAAwRh/8QAFAEBAAAAAAAAAAAAAAAA"
    "AAAAAP/EABcRAAMBAAAAAAAAAAAAAAAAAAACBAP/2gAMAwEAAhEDEQA/AJipsFqmwWqbBapsD7CWg//Z"
)


def sample_jpeg() -> Image:
    """A JPEG of 16 x 16 pixels."""
    return Image(base64.b64decode(_JPEG), "jpeg", 16, 16)


def make_png(width: int, height: int) -> Image:
    """A PNG with a colour gradient."""
    rows = b"".join(
        b"\0" + b"".join(bytes((255 * x // width, 255 * y // height, 96)) for x in range(width)) for y in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return Image(data, "png", width, height)
