"""Images that do not have the size that the model draws."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from calotype_server.images.encoder import encode_final, encode_preview
from calotype_server.images.metadata import describe
from calotype_server.images.scaling import scaling_notices
from calotype_server.types import OutputOptions, Pixels
from support.engine.fake_engine import MODEL
from support.runs import JOB

EDGE = 96
CIRCLE = np.fromfunction(
    lambda row, column, _: 255.0 * ((row - 47.5) ** 2 + (column - 47.5) ** 2 < 40**2), (EDGE, EDGE, 3)
).astype(np.uint8)
DRAWN = Pixels(EDGE, EDGE, CIRCLE.tobytes())
"""A white circle on black."""


def opened(data: bytes) -> Image.Image:
    """Returns the image in a file."""
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("size", [(200, 200), (33, 33), (200, 101), (50, 90)])
def test_the_final_image_has_the_requested_size(kind, size) -> None:
    """The file and its description agree, and the circle stays round: the image is cropped, not stretched."""
    file = encode_final(DRAWN, OutputOptions(kind, 90, size=size), "")
    image = opened(file.data)
    assert (file.width, file.height) == image.size == size
    columns, rows = (np.flatnonzero(np.asarray(image)[..., 0].max(axis) > 127) for axis in (0, 1))
    visible = [min(each, 2 * 40 * max(size) / EDGE) for each in size]
    assert [len(columns), len(rows)] == pytest.approx(visible, abs=3)


def test_scaling_is_smooth() -> None:
    """An edge of a scaled image is as sharp as that of the best filter, and no repetition of pixels."""
    image = opened(encode_final(DRAWN, OutputOptions("png", size=(384, 384)), "").data)
    expected = Image.fromarray(CIRCLE).resize((384, 384), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize(
    ("preview", "size", "max_edge", "expected"),
    [
        ((96, 96), (200, 100), 512, (96, 48)),
        ((96, 96), (200, 100), 48, (48, 24)),
        ((96, 96), (32, 16), 512, (32, 16)),
        ((96, 96), (384, 384), 512, (96, 96)),
        ((24, 24), (1, 2), 512, (1, 2)),
        ((24, 12), (100, 40), 512, (24, 10)),
    ],
)
def test_previews_have_the_aspect_ratio_of_the_image(preview, size, max_edge, expected) -> None:
    """A preview is at most as large as the image, the maximum edge, and what the decoder drew."""
    pixels = Pixels(preview[0], preview[1], bytes(3 * preview[0] * preview[1]))
    file = encode_preview(pixels, max_edge, 75, size)
    assert (file.width, file.height) == opened(file.data).size == expected


@given(*[st.integers(1, 400)] * 4)
def test_any_preview_can_be_scaled(width: int, height: int, wanted: int, tall: int) -> None:
    """No combination of sizes fails or gives a larger preview."""
    file = encode_preview(Pixels(width, height, bytes(3 * width * height)), 512, 75, (wanted, tall))
    assert 1 <= file.width <= min(width, wanted)
    assert 1 <= file.height <= min(height, tall)


def test_the_caller_is_warned() -> None:
    """The warning says which size was drawn, and whether parts of the drawing are missing."""
    assert scaling_notices(JOB) == ()
    for size, changed in (((128, 96), "scaled"), ((129, 96), "scaled"), ((128, 128), "cropped and scaled")):
        [notice] = scaling_notices(replace(JOB, output=OutputOptions(size=size)))
        assert notice.reason == "SIZE_SCALED"
        expected = f"The model does not support {size[0]}x{size[1]}. It draws 64x48, and the image is {changed}."
        assert notice.message == expected


def test_the_parameters_contain_both_sizes() -> None:
    """The size that the model draws reproduces the image; the other one is named separately."""
    scaled = describe(replace(JOB, output=OutputOptions(size=(200, 150))), MODEL)
    assert "Size: 64x48, Scaled to: 200x150, Model: fake" in scaled
    assert "Scaled to" not in describe(JOB, MODEL)
