"""Image files of previews and final images."""

from __future__ import annotations

import asyncio
import io
import random
import threading
from dataclasses import replace
from typing import Any

import pytest
from PIL import ExifTags, Image

from calotype_server import __version__
from calotype_server.failpoints import injected
from calotype_server.images.encoder import Encoder, encode_final, encode_preview
from calotype_server.images.metadata import describe
from calotype_server.types import (
    ImageFormat,
    Job,
    Lora,
    OutputOptions,
    Pixels,
    PreviewOptions,
    Sigmas,
    Speed,
    TimestepSpacing,
)
from support.engine.fake_engine import MODEL, flat_pixels

FORMATS: tuple[ImageFormat, ...] = ("jpeg", "png", "webp")
NOISE = Pixels(96, 64, random.Random(0).randbytes(96 * 64 * 3))
PATIENCE = 20
"""Seconds until a test that waits for a thread gives up."""

JOB = Job("a red apple", "pears", 64, 48, 20, 7.5, 123, "DDIMScheduler")


def opened(data: bytes) -> Any:
    """Returns the image, fully decoded by Pillow."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def parameters(data: bytes) -> str | None:
    """Returns the parameters that other tools find in a file, for any format."""
    image = opened(data)
    if image.format == "PNG":
        return image.text.get("parameters")
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if comment is None:
        return None
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("format", FORMATS)
def test_final_images_have_the_requested_format_and_size(format: ImageFormat) -> None:  # noqa: A002
    """The file and its description agree on format and size."""
    image = encode_final(NOISE, OutputOptions(format), "text")
    assert opened(image.data).format == format.upper()
    assert (image.format, image.width, image.height) == (format, 96, 64)
    assert opened(image.data).size == (96, 64)


def test_png_is_lossless() -> None:
    """A PNG decodes to the same pixels."""
    assert opened(encode_final(NOISE, OutputOptions("png"), "").data).tobytes() == NOISE.data


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_is_honoured(format: ImageFormat) -> None:  # noqa: A002
    """A higher quality makes a larger file that is closer to the pixels."""
    sizes, distances = [], []
    for quality in (10, 50, 95):
        data = encode_final(NOISE, OutputOptions(format, quality), "").data
        sizes.append(len(data))
        pairs = zip(opened(data).convert("RGB").tobytes(), NOISE.data, strict=True)
        distances.append(sum(abs(a - b) for a, b in pairs))
    assert sizes == sorted(set(sizes))
    assert distances == sorted(set(distances), reverse=True)


def test_final_jpegs_have_full_colour_resolution() -> None:
    """Final images have no chroma subsampling; previews do."""
    layers = {
        "final": opened(encode_final(NOISE, OutputOptions("jpeg"), "").data).layer,
        "preview": opened(encode_preview(NOISE, 512, 75).data).layer,
    }
    assert {kind: each[0][1:3] for kind, each in layers.items()} == {"final": (1, 1), "preview": (2, 2)}


@pytest.mark.parametrize(
    "text",
    [
        "a red apple\nSteps: 20, Seed: 1",
        "ein grüner Ärmel, 日本の庭, яблоко, 🍎",
        'quotes " and, commas: {braces} \\ back',
        "\x00 zero and \x07 bell",
        "x" * 8000,
        "🍎" * 8000,
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_parameters_survive_a_round_trip(format: ImageFormat, text: str) -> None:  # noqa: A002
    """Parameters in any language, up to the maximum prompt length, are read back unchanged."""
    assert parameters(encode_final(NOISE, OutputOptions(format), text).data) == text


@pytest.mark.parametrize("text", ["x" * 500_000, "🍎" * 200_000, "x" + "🍎" * 200_000])
@pytest.mark.parametrize("format", FORMATS)
def test_parameters_too_long_for_the_format_are_truncated(format: ImageFormat, text: str) -> None:  # noqa: A002
    """An EXIF block has a maximum size; parameters beyond it are cut at a character boundary."""
    found = parameters(encode_final(NOISE, OutputOptions(format), text).data)
    assert text.startswith(found)
    assert len(found) >= (len(text) if format == "png" else 14_000)


@pytest.mark.parametrize("format", FORMATS)
def test_without_metadata_the_file_has_no_prompt(format: ImageFormat) -> None:  # noqa: A002
    """The file has no metadata and does not contain the prompt in any encoding."""
    data = encode_final(NOISE, OutputOptions(format, metadata=False), "a secret prompt").data
    assert parameters(data) is None
    assert not opened(data).getexif()
    for spelt in ("secret", "prompt"):
        assert spelt.encode() not in data
        assert spelt.encode("utf-16-be") not in data


def test_metadata_does_not_change_pixels() -> None:
    """The image is the same with and without metadata."""
    for format in FORMATS:  # noqa: A001
        files = [encode_final(NOISE, OutputOptions(format, metadata=each), "text").data for each in (True, False)]
        assert opened(files[0]).tobytes() == opened(files[1]).tobytes()


@pytest.mark.parametrize(
    ("size", "edge", "expected"),
    [((96, 64), 48, (48, 32)), ((64, 96), 48, (32, 48)), ((96, 64), 96, (96, 64)), ((8, 8), 512, (8, 8))],
)
def test_previews_fit_their_edge_and_are_never_enlarged(
    size: tuple[int, int], edge: int, expected: tuple[int, int]
) -> None:
    """Previews are scaled down to the maximum edge, keeping proportions; smaller images keep their size."""
    preview = encode_preview(flat_pixels(*size, 9), edge, 75)
    assert preview.format == "jpeg"
    assert (preview.width, preview.height) == opened(preview.data).size == expected


def test_previews_have_no_metadata() -> None:
    """A preview has no EXIF data."""
    assert not opened(encode_preview(NOISE, 512, 75).data).getexif()


async def test_the_encoder_applies_options_and_reports_the_cost_of_previews() -> None:
    """Options reach the encoders; only previews count against the preview budget."""
    costs: list[float] = []
    encoder = Encoder(costs.append)
    try:
        preview = await encoder.preview(NOISE, PreviewOptions(max_edge=32, quality=20))
        assert preview == encode_preview(NOISE, 32, 20)
        final = await encoder.final(NOISE, OutputOptions("webp", 50), "text")
        assert final == encode_final(NOISE, OutputOptions("webp", 50), "text")
    finally:
        encoder.close()
    assert len(costs) == 1
    assert costs[0] >= 0


async def test_previews_do_not_wait_for_final_images() -> None:
    """While many final images take long, a preview of another generation is encoded."""
    encoder = Encoder()
    entered, gate = threading.Semaphore(0), threading.Event()
    try:
        with injected("encoder.final", lambda: (entered.release(), gate.wait(PATIENCE))):
            finals = [asyncio.ensure_future(encoder.final(NOISE, OutputOptions("png"), "")) for _ in range(8)]
            for _ in range(2):
                assert await asyncio.to_thread(entered.acquire, timeout=PATIENCE)
            preview = await asyncio.wait_for(encoder.preview(NOISE, PreviewOptions()), PATIENCE)
            assert preview.format == "jpeg"
            assert not any(final.done() for final in finals)
            gate.set()
            assert {final.format for final in await asyncio.gather(*finals)} == {"png"}
    finally:
        gate.set()
        encoder.close()


class TestDescribe:
    """The parameters as text."""

    def test_all_parameters_are_included(self) -> None:
        """The text has the prompt, the negative prompt and one line with all other parameters."""
        assert describe(JOB, MODEL).splitlines() == [
            "a red apple",
            "Negative prompt: pears",
            "Steps: 20, Sampler: DDIMScheduler, CFG scale: 7.5, Seed: 123, Size: 64x48, Model: fake, "
            f"Version: Calotype {__version__}",
        ]

    def test_the_noise_levels_are_included_if_they_were_chosen(self) -> None:
        """The text has the scheduler's familiar name, and chosen sigmas under the name that other programs read."""
        text = describe(replace(JOB, scheduler="DPM++ 2M", sigmas=Sigmas.KARRAS), MODEL)
        assert "Sampler: DPM++ 2M, Schedule type: Karras, CFG" in text
        text = describe(replace(JOB, spacing=TimestepSpacing.TRAILING), MODEL)
        assert "Sampler: DDIMScheduler, Timestep spacing: trailing, CFG" in text

    def test_absent_parameters_are_left_out(self) -> None:
        """The text has no empty negative prompt, and no guidance if the model does not support it."""
        text = describe(Job("a cat", None, 8, 8, 1, None, 0, "DDIMScheduler"), MODEL)
        assert "Negative" not in text
        assert "CFG" not in text
        assert "Seed: 0" in text

    def test_the_speed_is_included_if_it_is_not_exact(self) -> None:
        """The text names the speed of a fast image, because the other parameters do not reproduce it."""
        assert ", Speed: fast, " in describe(replace(JOB, speed=Speed.FAST), MODEL)
        assert "Speed" not in describe(JOB, MODEL)

    def test_loras(self):
        """LoRAs are tags at the end of the prompt, where the web UI looks for them."""
        job = replace(JOB, loras=(Lora("style", 0.8), Lora("subject", -1.0)))
        assert describe(job, MODEL).splitlines()[0] == f"{JOB.prompt} <lora:style:0.8> <lora:subject:-1>"

    def test_a_name_with_separators_is_quoted(self) -> None:
        """The name of a model can contain commas, colons and quotes."""
        text = describe(JOB, replace(MODEL, name='a, "b": c'))
        assert 'Model: "a, \\"b\\": c", Version' in text
