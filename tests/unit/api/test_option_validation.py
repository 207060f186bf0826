"""Validation of preview and output options."""

from __future__ import annotations

from dataclasses import replace

import pytest
from google.protobuf.duration_pb2 import Duration

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.validation import validate
from calotype_server.errors import InvalidRequest, PreviewMethodUnavailable
from calotype_server.limits import Limits
from calotype_server.types import (
    Job,
    OutputOptions,
    PreviewMethod,
    PreviewOptions,
)
from support.engine.fake_engine import MODEL
from support.service import LIMITS


def job(preview: dict | None = None, output: dict | None = None, limits: Limits = LIMITS, model=MODEL) -> Job:
    """Returns the job of a request with these options."""
    request = pb.GenerateRequest(prompt="a cat")
    if preview is not None:
        request.preview.CopyFrom(pb.PreviewOptions(**preview))
    if output is not None:
        request.output.CopyFrom(pb.OutputOptions(**output))
    return validate(request, model, limits)[0]


@pytest.mark.parametrize(
    ("preview", "field", "range_"),
    [
        ({"every_steps": 0}, "preview.every_steps", "1 to 1000"),
        ({"every_steps": -1}, "preview.every_steps", "1 to 1000"),
        ({"every_steps": 1001}, "preview.every_steps", "1 to 1000"),
        ({"min_interval": Duration(nanos=-1)}, "preview.min_interval", "0 to 60 s"),
        ({"min_interval": Duration(seconds=60, nanos=1)}, "preview.min_interval", "0 to 60 s"),
        ({"min_interval": Duration(seconds=2**62)}, "preview.min_interval", "0 to 60 s"),
        ({"max_edge_px": 15}, "preview.max_edge_px", "16 to 1024"),
        ({"max_edge_px": 1025}, "preview.max_edge_px", "16 to 1024"),
        ({"quality": 0}, "preview.quality", "1 to 95"),
        ({"quality": 96}, "preview.quality", "1 to 95"),
        ({"method": 99}, "preview.method", "unknown"),
    ],
)
def test_invalid_preview_options_are_rejected_with_their_range(preview: dict, field: str, range_: str) -> None:
    """The violation has the full name of the option, and its description has the valid range."""
    with pytest.raises(InvalidRequest) as caught:
        job(preview)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert range_ in violation.description


@pytest.mark.parametrize(
    ("output", "field", "expected"),
    [
        ({"format": 99}, "output.format", "unknown"),
        ({"quality": 90}, "output.quality", "does not apply to PNG"),
        ({"format": pb.IMAGE_FORMAT_PNG, "quality": 90}, "output.quality", "does not apply to PNG"),
        ({"format": pb.IMAGE_FORMAT_JPEG, "quality": 0}, "output.quality", "1 to 95"),
        ({"format": pb.IMAGE_FORMAT_JPEG, "quality": 96}, "output.quality", "1 to 95"),
        ({"format": pb.IMAGE_FORMAT_WEBP, "quality": 0}, "output.quality", "1 to 100"),
        ({"format": pb.IMAGE_FORMAT_WEBP, "quality": 101}, "output.quality", "1 to 100"),
    ],
)
def test_invalid_output_options_are_rejected(output: dict, field: str, expected: str) -> None:
    """Each lossy format has its own range of qualities; PNG has no quality."""
    with pytest.raises(InvalidRequest) as caught:
        job(output=output)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert expected in violation.description


@pytest.mark.parametrize(
    ("format", "edge", "longest"), [(pb.IMAGE_FORMAT_WEBP, 16384, 16383), (pb.IMAGE_FORMAT_JPEG, 65504, 65500)]
)
def test_an_image_too_large_for_its_format_is_rejected(
    format: pb.ImageFormat.ValueType,  # noqa: A002
    edge: int,
    longest: int,
) -> None:
    """A request is rejected before it runs if its edge exceeds the maximum of JPEG or WebP; PNG has no maximum."""
    limits = replace(LIMITS, max_pixels=2048 * 2048)

    def make_request(size: dict, format: pb.ImageFormat.ValueType) -> pb.GenerateRequest:  # noqa: A002
        return pb.GenerateRequest(prompt="a cat", output=pb.OutputOptions(format=format), **size)

    for size in ({"width_px": edge, "height_px": 8}, {"width_px": 8, "height_px": edge}):
        with pytest.raises(InvalidRequest) as caught:
            validate(make_request(size, format), MODEL, limits)
        assert [violation.field for violation in caught.value.violations] == ["output.format"]
        assert str(longest) in caught.value.violations[0].description
        validate(make_request(size, pb.IMAGE_FORMAT_PNG), MODEL, limits)
    validate(make_request({"width_px": longest // 8 * 8, "height_px": 8}, format), MODEL, limits)


@pytest.mark.parametrize(
    ("preview", "expected"),
    [
        ({"every_steps": 1}, {"every_steps": 1}),
        ({"every_steps": 1000}, {"every_steps": 1000}),
        ({"min_interval": Duration()}, {"min_interval": 0.0}),
        ({"min_interval": Duration(seconds=60)}, {"min_interval": 60.0}),
        ({"min_interval": Duration(nanos=250_000_000)}, {"min_interval": 0.25}),
        ({"max_edge_px": 16}, {"max_edge": 16}),
        ({"max_edge_px": 1024}, {"max_edge": 1024}),
        ({"quality": 1}, {"quality": 1}),
        ({"quality": 95}, {"quality": 95}),
        ({"method": pb.PREVIEW_METHOD_AUTO}, {"method": PreviewMethod.AUTO}),
        ({"method": pb.PREVIEW_METHOD_HEAD}, {"method": PreviewMethod.HEAD}),
        ({"method": pb.PREVIEW_METHOD_FULL_VAE}, {"method": PreviewMethod.FULL_VAE}),
        ({"method": pb.PREVIEW_METHOD_NONE}, {"method": PreviewMethod.NONE}),
    ],
)
def test_preview_options_are_applied(preview: dict, expected: dict) -> None:
    """The ends of the ranges are accepted; other options keep the operator's defaults."""
    assert job(preview).preview == replace(LIMITS.preview, **expected)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (None, OutputOptions("png", 90, True)),
        ({}, OutputOptions("png", 90, True)),
        ({"metadata": False}, OutputOptions("png", 90, False)),
        ({"metadata": True}, OutputOptions("png", 90, True)),
        ({"format": pb.IMAGE_FORMAT_JPEG}, OutputOptions("jpeg", 90, True)),
        ({"format": pb.IMAGE_FORMAT_JPEG, "quality": 1}, OutputOptions("jpeg", 1, True)),
        ({"format": pb.IMAGE_FORMAT_JPEG, "quality": 95}, OutputOptions("jpeg", 95, True)),
        ({"format": pb.IMAGE_FORMAT_WEBP, "quality": 100}, OutputOptions("webp", 100, True)),
    ],
)
def test_output_options_are_applied(output: dict, expected: OutputOptions) -> None:
    """The default is a PNG with metadata."""
    assert job(output=output).output == expected


OPERATORS = Limits(
    max_pixels=256 * 256,
    max_step_count=50,
    max_prompt_chars=200,
    max_preview_edge=128,
    max_preview_quality=60,
    preview=PreviewOptions(every_steps=4, min_interval=0.5, max_edge=96, quality=50, method=PreviewMethod.NONE),
    preview_methods=frozenset({PreviewMethod.HEAD, PreviewMethod.TINY_VAE}),
)


def test_unset_options_have_the_operators_defaults() -> None:
    """This holds without preview options, with empty ones, and with some of them."""
    assert job(None, limits=OPERATORS).preview == OPERATORS.preview
    assert job({}, limits=OPERATORS).preview == OPERATORS.preview
    assert job({"quality": 10}, limits=OPERATORS).preview == replace(OPERATORS.preview, quality=10)


def test_the_operators_maximums_are_enforced() -> None:
    """Values above the operator's maximums are rejected, and the message has the maximum."""
    assert job({"max_edge_px": 128, "quality": 60}, limits=OPERATORS).preview.max_edge == 128
    with pytest.raises(InvalidRequest) as caught:
        job({"max_edge_px": 129, "quality": 61}, limits=OPERATORS)
    assert [(v.field, v.description[-3:]) for v in caught.value.violations] == [
        ("preview.max_edge_px", "128"), ("preview.quality", " 60")
    ]  # fmt: skip


def test_a_forbidden_method_is_unavailable() -> None:
    """The server has FULL_VAE, but the operator forbids it: the error is FAILED_PRECONDITION, without a fallback."""
    with pytest.raises(PreviewMethodUnavailable, match="does not allow FULL_VAE previews") as caught:
        job({"method": pb.PREVIEW_METHOD_FULL_VAE}, limits=OPERATORS)
    assert (caught.value.code, caught.value.metadata) == ("FAILED_PRECONDITION", {"method": "FULL_VAE"})


def test_an_unconfigured_method_is_unavailable() -> None:
    """TINY_VAE is allowed but not configured: the message names the option for it."""
    with pytest.raises(
        PreviewMethodUnavailable, match=r"operator can configure one: calotype serve --tiny-vae"
    ) as caught:
        job({"method": pb.PREVIEW_METHOD_TINY_VAE})
    assert (caught.value.code, caught.value.metadata) == ("FAILED_PRECONDITION", {"method": "TINY_VAE"})
    configured = replace(MODEL, preview_methods=(*MODEL.preview_methods, PreviewMethod.TINY_VAE))
    assert job({"method": pb.PREVIEW_METHOD_TINY_VAE}, model=configured).preview.method is PreviewMethod.TINY_VAE


def test_a_method_that_the_model_lacks_is_unavailable() -> None:
    """A model whose preview head could not be fitted has no HEAD previews; AUTO and NONE always work."""
    bare = replace(MODEL, preview_methods=())
    with pytest.raises(PreviewMethodUnavailable, match="has no HEAD previews"):
        job({"method": pb.PREVIEW_METHOD_HEAD}, model=bare)
    assert job({"method": pb.PREVIEW_METHOD_AUTO}, model=bare).preview.method is PreviewMethod.AUTO
    assert job({"method": pb.PREVIEW_METHOD_NONE}, model=bare).preview.method is PreviewMethod.NONE


def test_violations_are_reported_before_an_unavailable_method() -> None:
    """A request with both problems gets the violations, which the caller can fix."""
    with pytest.raises(InvalidRequest) as caught:
        job({"method": pb.PREVIEW_METHOD_TINY_VAE, "quality": 0})
    assert [violation.field for violation in caught.value.violations] == ["preview.quality"]
