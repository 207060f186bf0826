"""From the wire to a job, or all that is wrong with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import InvalidRequest
from calotype_server.types import Job
from calotype_server.validation import validate
from support.fake_engine import MODEL
from support.service import LIMITS


def fields(request: pb.GenerateRequest, model=MODEL) -> list[str]:
    """The fields that are refused."""
    with pytest.raises(InvalidRequest) as caught:
        validate(request, model, LIMITS)
    return [violation.field for violation in caught.value.violations]


def test_defaults_come_from_the_model() -> None:
    """A prompt alone is enough; the seed is drawn and in range."""
    job = validate(pb.GenerateRequest(prompt="a cat"), MODEL, LIMITS)
    assert job == Job("a cat", None, 64, 64, 4, 3.0, job.seed, "DDIMScheduler")
    assert 0 <= job.seed < 2**32
    assert validate(pb.GenerateRequest(prompt="a cat"), MODEL, LIMITS).seed != job.seed


def test_every_violation_is_named_at_once() -> None:
    """Eight wrong fields give eight violations, in the order of the proto."""
    request = pb.GenerateRequest(
        prompt="  ",
        negative_prompt="n" * 201,
        width_px=9,
        height_px=-8,
        step_count=51,
        guidance_scale=float("nan"),
        seed=2**53,
        scheduler="NoScheduler",
    )
    assert fields(request) == [
        "prompt", "negative_prompt", "width_px", "height_px", "step_count", "guidance_scale", "seed", "scheduler"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 201}, "prompt"),
        ({"width_px": 0}, "width_px"),
        ({"height_px": 12}, "height_px"),
        ({"width_px": 264, "height_px": 256}, "width_px"),
        ({"step_count": 0}, "step_count"),
        ({"step_count": -1}, "step_count"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"guidance_scale": 100.1}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"scheduler": ""}, "scheduler"),
    ],
)
def test_bad_values_are_refused_by_name(changes: dict, field: str) -> None:
    """Each value out of range is refused under its own name."""
    assert fields(pb.GenerateRequest(**{"prompt": "a cat", **changes})) == [field]


@pytest.mark.parametrize(
    "changes",
    [
        {"width_px": 256, "height_px": 256},
        {"width_px": 8, "height_px": 8},
        {"step_count": 1},
        {"step_count": 50},
        {"guidance_scale": 0.0},
        {"guidance_scale": 100.0},
        {"seed": 0},
        {"seed": 2**53 - 1},
        {"scheduler": "EulerDiscreteScheduler"},
        {"negative_prompt": "blur"},
    ],
)
def test_the_ends_of_ranges_are_accepted(changes: dict) -> None:
    """Ranges are inclusive, and zero is a value, not a default."""
    job = validate(pb.GenerateRequest(prompt="a cat", **changes), MODEL, LIMITS)
    names = {"width_px": "width", "height_px": "height"}
    assert {name: getattr(job, names.get(name, name)) for name in changes} == changes


def test_parameters_that_the_pipeline_lacks_are_refused_not_ignored() -> None:
    """A model without guidance and negative prompt says so."""
    bare = replace(MODEL, guidance_scale=None, takes_negative_prompt=False)
    assert fields(pb.GenerateRequest(prompt="a", guidance_scale=1, negative_prompt="b"), bare) == [
        "negative_prompt", "guidance_scale"
    ]  # fmt: skip
    assert validate(pb.GenerateRequest(prompt="a"), bare, LIMITS).guidance_scale is None


@given(
    st.builds(
        pb.GenerateRequest,
        prompt=st.text(),
        negative_prompt=st.none() | st.text(),
        width_px=st.none() | st.integers(-(2**31), 2**31 - 1),
        height_px=st.none() | st.integers(-(2**31), 2**31 - 1),
        step_count=st.none() | st.integers(-(2**31), 2**31 - 1),
        guidance_scale=st.none() | st.floats(width=32),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        scheduler=st.none() | st.text(),
    )
)
def test_anything_gives_a_job_within_limits_or_violations(request: pb.GenerateRequest) -> None:
    """No request, however odd, raises anything else, and no job exceeds a limit."""
    try:
        job = validate(request, MODEL, LIMITS)
    except InvalidRequest as error:
        assert error.violations
    else:
        assert job.pixel_count <= LIMITS.max_pixels
        assert 1 <= job.step_count <= LIMITS.max_step_count
