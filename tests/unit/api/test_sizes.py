"""Sizes of requests: supported, rejected, or drawn at the nearest supported size and scaled."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.encoding import encode_model
from calotype_server.api.sizes import narrowed, nearest_sizes
from calotype_server.api.validation import validate
from calotype_server.errors import InvalidRequest
from calotype_server.limits import Limits
from calotype_server.types import Job, MemoryModel
from support.engine.fake_engine import MODEL

LIMITS = Limits(max_pixels=2048 * 2048, max_output_pixels=1024 * 1024)
ONE_SIZE = replace(MODEL, sizes=((64, 64),), min_pixels=0)
TABLE = replace(MODEL, sizes=((64, 64), (96, 48), (48, 96), (128, 128)), min_pixels=0)
RANGE = replace(MODEL, sizes=((64, 64), (80, 48), (48, 80)), min_pixels=2048, max_pixels=8192, max_aspect_ratio=2.0)
MODELS = {"one size": ONE_SIZE, "table": TABLE, "range": RANGE, "any": MODEL}


def job_for(model, width: int | None = None, height: int | None = None, limits: Limits = LIMITS, **others) -> Job:
    """Returns the job of a request with that size."""
    request = pb.GenerateRequest(prompt="a", width_px=width, height_px=height, **others)
    return validate(request, model, narrowed(limits, model))[0]


def violations(model, width: int | None = None, height: int | None = None, limits: Limits = LIMITS) -> dict[str, str]:
    """Returns what validation says against the size, by field."""
    with pytest.raises(InvalidRequest) as caught:
        job_for(model, width, height, limits)
    return {each.field: each.description for each in caught.value.violations}


class TestRejected:
    """By default, an unsupported size is one violation that names the nearest supported sizes."""

    def test_a_model_of_one_size(self) -> None:
        """The only size is named, under the field that the request set."""
        text = "is not a size that the model supports; the only supported size is 64x64"
        assert violations(ONE_SIZE, 192, 192) == {"width_px": f"192x192 {text}"}
        assert violations(ONE_SIZE, height=192) == {"height_px": f"64x192 {text}"}
        assert violations(ONE_SIZE, 65) == {"width_px": f"65x64 {text}"}

    def test_the_nearest_sizes_come_first(self) -> None:
        """First the nearest aspect ratio, then the nearest area."""
        text = "is not a size that the model supports; the nearest supported sizes are"
        assert violations(TABLE, 192, 96) == {"width_px": f"192x96 {text} 96x48, 128x128, 64x64, 48x96"}
        assert violations(TABLE, 40, 40)["width_px"] == f"40x40 {text} 64x64, 128x128, 48x96, 96x48"

    def test_a_long_list_is_shortened(self) -> None:
        """At most eight sizes are named."""
        many = replace(TABLE, sizes=tuple((64 + 8 * number, 64) for number in range(20)))
        named = violations(many, 16, 16)["width_px"]
        assert named.count("x64") == 8
        assert named.endswith(", ...")

    def test_outside_a_range(self) -> None:
        """The nearest size of the range is named before the listed ones."""
        text = "is not a size that the model supports; the nearest supported sizes are"
        assert violations(RANGE, 24, 24) == {"width_px": f"24x24 {text} 48x48, 64x64, 48x80, 80x48"}
        assert violations(RANGE, 128, 32)["width_px"].startswith(f"128x32 {text} 96x48, 80x48")
        assert violations(RANGE, 256, 256)["width_px"].startswith("256x256 has 65536 pixels, the maximum is 8192;")

    def test_multiples(self) -> None:
        """Edges in between multiples are named one by one."""
        assert violations(RANGE, 65, 63) == {
            "width_px": "is 65, must be a positive multiple of 8",
            "height_px": "is 63, must be a positive multiple of 8",
        }

    @pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
    def test_nonsense_is_rejected(self, model) -> None:
        """Zero and negative edges are violations of their fields, also if the server scales."""
        for each in (model, replace(model, scales_other_sizes=True)):
            assert set(violations(each, 0, -64)) == {"width_px", "height_px"}


class TestScaled:
    """With `--other-sizes scale`, the nearest supported size is drawn, and the image has the requested size."""

    @pytest.mark.parametrize(
        ("model", "requested", "drawn"),
        [
            (ONE_SIZE, (192, 192), (64, 64)),
            (ONE_SIZE, (101, 67), (64, 64)),
            (TABLE, (200, 100), (96, 48)),
            (TABLE, (120, 121), (128, 128)),
            (RANGE, (65, 63), (64, 64)),
            (RANGE, (1000, 1000), (88, 88)),
            (RANGE, (160, 40), (112, 56)),
        ],
    )
    def test_the_nearest_size_is_drawn(self, model, requested, drawn) -> None:
        """The job has both sizes, and its pixels are those that the model draws."""
        job = job_for(replace(model, scales_other_sizes=True), *requested)
        assert (job.width, job.height) == drawn
        assert job.output_size == job.output.size == requested
        assert job.pixel_count == math.prod(drawn)

    def test_a_supported_size_is_not_scaled(self) -> None:
        """The image is as without the option."""
        scaling = replace(RANGE, scales_other_sizes=True)
        assert job_for(scaling, 72, 64, seed=1) == job_for(RANGE, 72, 64, seed=1)
        assert job_for(scaling, 72, 64).output.size is None

    def test_the_output_is_bounded(self) -> None:
        """A small drawing does not allow a huge image."""
        found = violations(replace(ONE_SIZE, scales_other_sizes=True), 2048, 1024)
        assert found == {"width_px": "2048x1024 has 2097152 pixels, the maximum is 1048576"}

    def test_narrow_images_are_rejected(self) -> None:
        """The image shows at least half of the drawn one."""
        scaling = replace(ONE_SIZE, scales_other_sizes=True)
        assert job_for(scaling, 128, 64).output_size == (128, 64)
        wide = replace(scaling, sizes=((256, 64),), width=256, height=64)
        assert "96x64 is too tall" in violations(wide, 96, 64)["width_px"]
        assert "129x64 is too wide" in violations(scaling, 129, 64)["width_px"]
        assert "1x1000000 is too tall" in violations(scaling, 1, 1_000_000)["width_px"]

    def test_the_file_format_counts_the_output(self) -> None:
        """WebP supports 16383 pixels per side, of the image that the file contains."""
        wide = replace(MODEL, sizes=((64, 8),), min_pixels=0, width=64, height=8, scales_other_sizes=True)
        with pytest.raises(InvalidRequest, match=r"output\.format: WEBP supports at most 16383 px per side"):
            webp = pb.OutputOptions(format=pb.IMAGE_FORMAT_WEBP)
            job_for(wide, 20_000, 2_000, replace(LIMITS, max_output_pixels=2**30), output=webp)


class TestLimits:
    """The limits of operator, memory and model together."""

    def test_the_model_bounds_the_pixels(self) -> None:
        """`Model.max_pixels` is that of the range, or of the largest listed size."""
        assert [narrowed(LIMITS, model).max_pixels for model in MODELS.values()] == [64 * 64, 128 * 128, 8192, 2**22]

    def test_sizes_beyond_the_limits_are_not_offered(self) -> None:
        """Neither `Model.sizes` nor a violation names a size that does not fit into the memory."""
        model = replace(TABLE, memory=MemoryModel(4700, (1.0, 0.0), (0.0, 0.0)))
        limits = narrowed(LIMITS, model)
        found = encode_model(model, limits, "1", "r")
        assert [(size.width_px, size.height_px) for size in found.sizes] == [(64, 64), (96, 48), (48, 96)]
        assert found.max_pixels == 4700
        assert "128x128 has 16384 pixels" in violations(model, 128, 128)["width_px"]
        assert job_for(replace(model, scales_other_sizes=True), 128, 128).width == 64

    def test_the_model_describes_its_range(self) -> None:
        """`GetModel` reports everything that a client needs to check a size."""
        found = encode_model(replace(RANGE, scales_other_sizes=True), narrowed(LIMITS, RANGE), "1", "r")
        assert (found.min_pixels, found.max_pixels, found.max_aspect_ratio) == (2048, 8192, 2.0)
        assert found.scales_other_sizes
        assert encode_model(MODEL, LIMITS, "1", "r").max_aspect_ratio == 0


edges = st.integers(1, 300) | st.integers(-(2**31), 2**31 - 1)


@given(st.sampled_from(list(MODELS.values())), edges, edges, st.booleans())
def test_any_size_is_drawn_well_or_rejected(model, width: int, height: int, scales: bool) -> None:
    """The model supports every size that it draws, and the image has the requested size."""
    model = replace(model, scales_other_sizes=scales)
    limits = narrowed(LIMITS, model)
    try:
        job = job_for(model, width, height)
    except InvalidRequest as error:
        assert {each.field for each in error.violations} <= {"width_px", "height_px"}
        assert not (model.supports_size(width, height) and width * height <= limits.max_pixels)
    else:
        assert model.supports_size(job.width, job.height)
        assert job.pixel_count <= limits.max_pixels
        assert job.output_size == (width, height)
        assert scales or job.output.size is None
        assert width * height <= max(limits.max_pixels, limits.max_output_pixels)


@given(st.sampled_from(list(MODELS.values())), st.integers(1, 10_000), st.integers(1, 10_000))
def test_nearest_sizes_are_supported(model, width: int, height: int) -> None:
    """Every size that a violation names is accepted."""
    limits = narrowed(LIMITS, model)
    found = nearest_sizes((width, height), model, limits)
    assert found
    for size in found:
        job = job_for(model, *size)
        assert (job.output_size, job.output.size) == (size, None)
