"""Makes small valid images without an image library, for `calotype.testing`."""

from __future__ import annotations

import base64
import struct
import zlib

from .._image import Image

__all__ = ["make_image", "make_png", "sample_jpeg"]

_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8"
    "ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKT/wAAR"
    "CAAQABADASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAABAX/xAAXEAADAQAAAAAAAAAAAAAAAAAAAwRh/8QAFAEBAAAAAAAAAAAAAAAA"
    "AAAAAP/EABcRAAMBAAAAAAAAAAAAAAAAAAACBAP/2gAMAwEAAhEDEQA/AJipsFqmwWqbBapsD7CWg//Z"
)


def sample_jpeg() -> Image:
    """Returns a JPEG of 16 x 16 pixels."""
    return Image(base64.b64decode(_JPEG), "jpeg", 16, 16)


def make_image(image_format: str, width: int, height: int) -> Image:
    """Makes an image: a colour gradient for "png", a single colour for "jpeg" and "webp"."""
    return {"jpeg": _make_jpeg, "png": make_png, "webp": _make_webp}[image_format](width, height)


def make_png(width: int, height: int) -> Image:
    """Makes a PNG with a colour gradient."""
    rows = b"".join(
        b"\0" + b"".join(bytes((255 * x // width, 255 * y // height, 96)) for x in range(width)) for y in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return Image(data, "png", width, height)


def _make_jpeg(width: int, height: int) -> Image:
    """Makes a grey JPEG: each block is "no difference" and "end of block", in codes of one bit each."""

    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body

    one_code = b"\1" + bytes(15) + b"\0"  # a Huffman table whose one symbol, 0, is one bit long
    blocks = -(-width // 8) * -(-height // 8)
    filled, used = divmod(2 * blocks, 8)
    scan = bytes(filled) + (bytes([0xFF >> used]) if used else b"")
    data = b"".join(
        (
            b"\xff\xd8",
            segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xC0, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"),
            segment(0xC4, b"\0" + one_code + b"\x10" + one_code),
            segment(0xDA, b"\1\1\0\0\x3f\0"),
            scan,
            b"\xff\xd9",
        )
    )
    return Image(data, "jpeg", width, height)


def _make_webp(width: int, height: int) -> Image:
    """Makes a lossless WebP of one colour: each channel's prefix code has one symbol, so pixels take no bits."""
    fields = [(width - 1, 14), (height - 1, 14), (0, 4), (0, 3)]  # then: no alpha, version 0, no transforms or caches
    for channel in (160, 200, 96, 255):  # green, red, blue, alpha
        fields += [(0b101, 3), (channel, 8)]
    fields += [(0b001, 3), (0, 1)]  # distances
    bits, length = 0, 0
    for value, size in fields:
        bits, length = bits | value << length, length + size
    body = b"\x2f" + bits.to_bytes(-(-length // 8), "little")
    body = b"VP8L" + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    return Image(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body, "webp", width, height)
