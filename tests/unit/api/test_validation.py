"""Validation of requests: a job, or all violations."""

from __future__ import annotations

from dataclasses import replace

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.validation import validate, validate_page, validate_watch, watched_previews
from calotype_server.errors import InvalidRequest, PreviewMethodUnavailable
from calotype_server.types import (
    DeliveryOptions,
    DisconnectPolicy,
    Job,
    Speed,
)
from support.engine.fake_engine import MODEL
from support.service import LIMITS


def fields(request: pb.GenerateRequest, model=MODEL) -> list[str]:
    """Returns the fields that validation rejects."""
    with pytest.raises(InvalidRequest) as caught:
        validate(request, model, LIMITS)
    return [violation.field for violation in caught.value.violations]


def test_defaults_come_from_the_model() -> None:
    """A prompt alone is a valid request; the server draws a seed."""
    job, _ = validate(pb.GenerateRequest(prompt="a cat"), MODEL, LIMITS)
    assert job == Job("a cat", None, 64, 64, 4, 3.0, job.seed, "DDIMScheduler")
    assert 0 <= job.seed < 2**32
    assert validate(pb.GenerateRequest(prompt="a cat"), MODEL, LIMITS)[0].seed != job.seed


def test_every_violation_is_named_at_once() -> None:
    """One error lists all violations, in the order of the proto's fields."""
    request = pb.GenerateRequest(
        prompt="  ",
        negative_prompt="n" * 201,
        width_px=9,
        height_px=-8,
        step_count=51,
        guidance_scale=float("nan"),
        seed=2**53,
        scheduler="NoScheduler",
        preview=pb.PreviewOptions(
            every_steps=0,
            min_interval=Duration(seconds=-1),
            max_edge_px=15,
            quality=96,
            method=77,  # type: ignore[arg-type]
        ),
        output=pb.OutputOptions(format=77, quality=101),  # type: ignore[arg-type]
        priority=77,  # type: ignore[arg-type]
        on_disconnect=77,  # type: ignore[arg-type]
        disconnect_grace=Duration(seconds=-1),
        request_id="\n",
        speed=77,  # type: ignore[arg-type]
        loras=[pb.Lora(name="unknown")],
        prompt_syntax=77,  # type: ignore[arg-type]
        sigmas=77,  # type: ignore[arg-type]
        spacing=77,  # type: ignore[arg-type]
        group="\n",
    )
    assert fields(request) == [
        "prompt", "negative_prompt", "width_px", "height_px", "step_count", "guidance_scale", "seed", "scheduler",
        "preview.every_steps", "preview.max_edge_px", "preview.quality", "preview.min_interval", "preview.method",
        "output.format", "output.quality", "priority", "on_disconnect", "disconnect_grace", "request_id", "speed",
        "loras", "prompt_syntax", "sigmas", "spacing", "group",
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
        ({"seed": -2}, "seed"),
        ({"scheduler": ""}, "scheduler"),
    ],
)
def test_invalid_values_are_rejected_by_field(changes: dict, field: str) -> None:
    """Each value out of range is reported under the name of its field."""
    assert fields(pb.GenerateRequest(**{"prompt": "a cat", **changes})) == [field]


def test_some_schedulers_support_fewer_steps() -> None:
    """The maximum is the lower one of the scheduler and the operator, and also limits the default."""
    model = replace(MODEL, step_count=40, max_step_counts={"DDIMScheduler": 1000, "EulerDiscreteScheduler": 8})
    named = pb.GenerateRequest(prompt="a cat", scheduler="EulerDiscreteScheduler")
    assert validate(named, model, LIMITS)[0].step_count == 8
    named.step_count = 9
    assert fields(named, model) == ["step_count"]
    named.scheduler = "DDIMScheduler"
    assert validate(named, model, LIMITS)[0].step_count == 9
    named.step_count = LIMITS.max_step_count + 1
    assert fields(named, model) == ["step_count"]


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
    job, _ = validate(pb.GenerateRequest(prompt="a cat", **changes), MODEL, LIMITS)
    names = {"width_px": "width", "height_px": "height"}
    assert {name: getattr(job, names.get(name, name)) for name in changes} == changes


def test_unsupported_parameters_are_rejected() -> None:
    """Guidance and negative prompts are rejected, not ignored, when the model does not support them."""
    bare = replace(MODEL, guidance_scale=None, takes_negative_prompt=False)
    assert fields(pb.GenerateRequest(prompt="a", guidance_scale=1, negative_prompt="b"), bare) == [
        "negative_prompt", "guidance_scale"
    ]  # fmt: skip
    assert validate(pb.GenerateRequest(prompt="a"), bare, LIMITS)[0].guidance_scale is None


@pytest.mark.parametrize(
    ("threshold", "default", "changes", "rejected"),
    [
        (1.0, 5.0, {}, False),
        (1.0, 5.0, {"guidance_scale": 1.0}, True),
        (1.0, 5.0, {"guidance_scale": 1.5}, False),
        (0.0, 5.0, {"guidance_scale": 0.5}, False),
        (0.0, 5.0, {"guidance_scale": 0.0}, True),
        (1.0, 0.0, {}, True),
        (1.0, 0.0, {"guidance_scale": 2.0}, False),
        (None, None, {}, False),
    ],
)
def test_a_negative_prompt_needs_guidance(threshold, default, changes: dict, rejected: bool) -> None:
    """A negative prompt is rejected if the guidance, of the request or by default, is too low for it."""
    model = replace(MODEL, guidance_scale=default, negative_prompt_above=threshold)
    request = pb.GenerateRequest(prompt="a", negative_prompt="b", **changes)
    assert (fields(request, model) if rejected else validate(request, model, LIMITS)[0].negative_prompt) == (
        ["negative_prompt"] if rejected else "b"
    )
    request.negative_prompt = ""
    assert validate(request, model, LIMITS)[0].negative_prompt is None


@pytest.mark.parametrize(
    ("schedulers", "changes", "description"),
    [
        ((), {}, "is FAST, which this server does not offer"),
        (("EulerDiscreteScheduler",), {}, "is FAST, which needs one of the schedulers EulerDiscreteScheduler"),
        (("DDIMScheduler",), {"step_count": 15}, "is FAST, which needs at least 16 steps"),
        (("DDIMScheduler",), {"speed": 9}, "has the unknown value 9"),
    ],
)
def test_a_speed_without_effect_is_rejected(schedulers: tuple[str, ...], changes: dict, description: str) -> None:
    """FAST is rejected with one violation where it is not offered or would not skip a step."""
    request = pb.GenerateRequest(**{"prompt": "a", "step_count": 20, "speed": pb.SPEED_FAST, **changes})
    with pytest.raises(InvalidRequest) as caught:
        validate(request, replace(MODEL, fast_schedulers=schedulers), LIMITS)
    assert [(each.field, each.description) for each in caught.value.violations] == [("speed", description)]


def test_the_speed_is_part_of_the_job() -> None:
    """FAST is accepted where it is offered, its work counts computed steps, and EXACT is the default."""
    model = replace(MODEL, fast_schedulers=("DDIMScheduler",))
    job, _ = validate(pb.GenerateRequest(prompt="a", step_count=28, speed=pb.SPEED_FAST), model, LIMITS)
    assert (job.speed, job.computed_step_count, job.computed_steps(8, 28)) == (Speed.FAST, 14, 6)
    exact, _ = validate(pb.GenerateRequest(prompt="a", step_count=28), model, LIMITS)
    assert (exact.speed, exact.computed_step_count) == (Speed.EXACT, 28)


int32s = st.none() | st.integers(-(2**31), 2**31 - 1)


@given(
    st.builds(
        pb.GenerateRequest,
        prompt=st.text(),
        negative_prompt=st.none() | st.text(),
        width_px=int32s,
        height_px=int32s,
        step_count=int32s,
        guidance_scale=st.none() | st.floats(width=32),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        scheduler=st.none() | st.text(),
        preview=st.builds(
            pb.PreviewOptions,
            every_steps=int32s,
            min_interval=st.none() | st.builds(Duration, seconds=st.integers(-(2**63), 2**63 - 1), nanos=int32s),
            max_edge_px=int32s,
            quality=int32s,
            method=st.integers(-9, 9),
        ),
        output=st.builds(pb.OutputOptions, format=st.integers(-9, 9), quality=int32s),
    )
)
def test_anything_gives_a_job_within_limits_or_violations(request: pb.GenerateRequest) -> None:
    """Any request gives a job within the limits or one of the two documented errors."""
    try:
        job, _ = validate(request, MODEL, LIMITS)
    except InvalidRequest as error:
        assert error.violations
    except PreviewMethodUnavailable as error:
        assert error.metadata["method"] == "TINY_VAE"
    else:
        assert 1 <= job.preview.every_steps <= 1000
        assert 0 <= job.preview.min_interval <= 60
        assert 16 <= job.preview.max_edge <= LIMITS.max_preview_edge
        assert 1 <= job.preview.quality <= LIMITS.max_preview_quality
        assert 1 <= job.output.quality <= 100
        assert job.pixel_count <= LIMITS.max_pixels
        assert 1 <= job.step_count <= LIMITS.max_step_count


def test_delivery_options_are_read_with_defaults() -> None:
    """By default, a disconnect cancels at once, there is no request id, and the server draws the seed."""
    _, delivery = validate(pb.GenerateRequest(prompt="a"), MODEL, LIMITS)
    assert delivery == DeliveryOptions(seed_was_drawn=True)
    request = pb.GenerateRequest(
        prompt="a",
        seed=1,
        on_disconnect=pb.DISCONNECT_POLICY_KEEP,
        disconnect_grace=Duration(seconds=2, nanos=500_000_000),
        request_id="mine",
    )
    _, delivery = validate(request, MODEL, LIMITS)
    assert delivery == DeliveryOptions(on_disconnect=DisconnectPolicy.KEEP, grace=2.5, request_id="mine")


def test_invalid_delivery_options_are_reported_together() -> None:
    """An unknown policy, a grace above an hour, and an unprintable request id are three violations."""
    request = pb.GenerateRequest(
        prompt="a",
        on_disconnect=7,  # type: ignore[arg-type]
        disconnect_grace=Duration(seconds=3601),
        request_id="a\nb",
    )
    with pytest.raises(InvalidRequest) as caught:
        validate(request, MODEL, LIMITS)
    assert [violation.field for violation in caught.value.violations] == [
        "on_disconnect",
        "disconnect_grace",
        "request_id",
    ]


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (pb.WatchRequest(), ["generation_id"]),
        (pb.WatchRequest(generation_id="a", after_sequence=-1), ["after_sequence"]),
        (pb.WatchRequest(generation_id="a", preview=pb.PreviewOptions(quality=0)), ["preview.quality"]),
    ],
)
def test_an_invalid_watch_request_is_rejected(request_: pb.WatchRequest, fields: list[str]) -> None:
    """Violations have the names of the fields, as for `Generate`."""
    with pytest.raises(InvalidRequest) as caught:
        validate_watch(request_, LIMITS)
    assert [violation.field for violation in caught.value.violations] == fields


def test_watching_changes_only_the_given_options() -> None:
    """Other preview options are those of the generation."""
    job, _ = validate(pb.GenerateRequest(prompt="a", preview=pb.PreviewOptions(quality=11)), MODEL, LIMITS)
    request = pb.WatchRequest(generation_id="a", preview=pb.PreviewOptions(max_edge_px=64))
    validate_watch(request, LIMITS)
    assert watched_previews(request, LIMITS, job) == replace(job.preview, max_edge=64)
    assert watched_previews(pb.WatchRequest(generation_id="a"), LIMITS, job) is None


@pytest.mark.parametrize("wrong", [{"page_size": 0}, {"page_size": 101}, {"page_token": "x"}, {"page_token": "-1"}])
def test_an_invalid_page_is_rejected(wrong: dict) -> None:
    """Page sizes are 1 to 100, and page tokens are numbers."""
    with pytest.raises(InvalidRequest):
        validate_page(pb.ListGenerationsRequest(**wrong))
    assert validate_page(pb.ListGenerationsRequest()) == (50, None)
    assert validate_page(pb.ListGenerationsRequest(page_size=100, page_token="17")) == (100, 17)
