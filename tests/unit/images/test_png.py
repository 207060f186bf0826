"""PNG files: any image and text can be read back, by Pillow and by a decoder that checks every byte."""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from calotype_server.images import png
from calotype_server.images.png import encode_png
from calotype_server.types import Pixels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZES = st.integers(1, 40)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@st.composite
def images(draw: st.DrawFn) -> Pixels:
    """Returns any small image: noise, smooth or flat."""
    width, height = draw(SIZES), draw(SIZES)
    chosen = draw(st.sampled_from(["noise", "smooth", "flat"]))
    source = random.Random(draw(st.integers(0, 9)))
    if chosen == "noise":
        data = source.randbytes(width * height * 3)
    elif chosen == "smooth":
        data = bytes((x * 3 + y * 7 + c * 50) % 256 for y in range(height) for x in range(width) for c in range(3))
    else:
        data = source.randbytes(3) * (width * height)
    return Pixels(width, height, data)


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the type and content of each chunk, and checks the signature, the lengths and the CRCs."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position = 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, content = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length) == (zlib.crc32(kind + content),)
        yield kind, content
        position += 12 + length
    assert position == len(data)


def decoded(data: bytes) -> Pixels:
    """Returns the image of a PNG file as this module writes it: RGB, 8 bits, filter "Up" in every row."""
    found = list(chunks(data))
    kinds = [kind for kind, _ in found]
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    width, height, *rest = struct.unpack(">IIBBBBB", found[0][1])
    assert rest == [8, 2, 0, 0, 0]
    inflate = zlib.decompressobj()
    stream = inflate.decompress(b"".join(content for kind, content in found if kind == b"IDAT"))
    assert inflate.eof
    assert not inflate.unused_data
    rows, above = [], bytes(width * 3)
    for y in range(height):
        kind, *row = stream[y * (1 + width * 3) : (y + 1) * (1 + width * 3)]
        assert kind == 2
        above = bytes((a + b) % 256 for a, b in zip(row, above, strict=True))
        rows.append(above)
    return Pixels(width, height, b"".join(rows))


def opened(data: bytes) -> Any:
    """Returns the image, fully decoded by Pillow."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@settings(max_examples=100, deadline=None)
@given(images(), TEXTS)
def test_any_image_and_text_can_be_read_back(pixels: Pixels, text: str) -> None:
    """Pillow and a second decoder return the same pixels; Pillow returns the same text."""
    data = encode_png(pixels, {"parameters": text})
    assert decoded(data) == pixels
    image = opened(data)
    assert (image.mode, image.size, image.tobytes()) == ("RGB", (pixels.width, pixels.height), pixels.data)
    assert image.text == {"parameters": text}
    assert encode_png(pixels, {"parameters": text}) == data


def test_texts_precede_the_pixels_and_are_optional() -> None:
    """Tools that read only the beginning of a file find the text, and a file without texts has only pixels."""
    pixels = Pixels(1, 1, b"abc")
    assert [kind for kind, _ in chunks(encode_png(pixels, {"a": "b", "c": "d"}))] == [
        b"IHDR",
        b"iTXt",
        b"iTXt",
        b"IDAT",
        b"IEND",
    ]
    assert [kind for kind, _ in chunks(encode_png(pixels, {}))] == [b"IHDR", b"IDAT", b"IEND"]


def test_the_text_chunk_is_the_same_as_pillows() -> None:
    """The text is stored byte for byte as Pillow stores it, which other tools read."""
    text = "ein grüner Ärmel\nSteps: 20"
    info = PngInfo()
    info.add_itxt("parameters", text)
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png", pnginfo=info)
    theirs, ours = (
        [content for kind, content in chunks(data) if kind == b"iTXt"]
        for data in (file.getvalue(), encode_png(Pixels(1, 1, bytes(3)), {"parameters": text}))
    )
    assert ours == theirs


def test_large_images_have_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders limit the size of a chunk, so the pixels are split."""
    monkeypatch.setattr(png, "_MAX_CHUNK_BYTES", 1000)
    pixels = Pixels(64, 48, random.Random(0).randbytes(64 * 48 * 3))
    data = encode_png(pixels, {})
    lengths = [len(content) for kind, content in chunks(data) if kind == b"IDAT"]
    assert len(lengths) > 9
    assert set(lengths[:-1]) == {1000}
    assert decoded(data) == pixels
    assert opened(data).tobytes() == pixels.data


def test_smooth_images_are_hardly_larger_than_pillows() -> None:
    """A gradient with noise, as in photographs, takes at most 10 % more bytes than Pillow's level 3."""
    noise = random.Random(0)
    size = 128
    data = bytes(
        (x + 2 * y + 40 * c) // 4 % 256 ^ noise.getrandbits(2)
        for y in range(size)
        for x in range(size)
        for c in range(3)
    )
    file = io.BytesIO()
    Image.frombytes("RGB", (size, size), data).save(file, "png", compress_level=3)
    assert len(encode_png(Pixels(size, size, data), {})) <= 1.1 * len(file.getvalue())


def test_other_threads_run_while_a_file_is_written() -> None:
    """Encoding releases the interpreter lock; in this test, Python never takes the lock from its holder."""
    pixels = Pixels(512, 512, random.Random(0).randbytes(512 * 512 * 3))
    interval = sys.getswitchinterval()
    ran, started, gate = threading.Event(), threading.Event(), threading.Lock()
    gate.acquire()

    def other() -> None:
        started.set()
        with gate:
            ran.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert started.wait(20)
    sys.setswitchinterval(1000)
    try:
        gate.release()  # The thread now waits for the interpreter lock.
        for _ in range(200):
            encode_png(pixels, {})
            if ran.is_set():
                break
        assert ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()


@pytest.mark.skipif(shutil.which("pngcheck") is None, reason="needs pngcheck")
def test_pngcheck_finds_no_error(tmp_path: Path) -> None:
    """The reference checker accepts a file with text."""
    path = tmp_path / "image.png"
    path.write_bytes(encode_png(Pixels(64, 48, random.Random(0).randbytes(64 * 48 * 3)), {"parameters": "日本の庭"}))
    subprocess.run(["pngcheck", path], check=True, capture_output=True, timeout=20)
