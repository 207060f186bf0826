"""Which stored generations run again after a restart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calotype_server import errors
from calotype_server.generations.index import StoredGeneration
from calotype_server.generations.records import dump_record, parse_record
from calotype_server.generations.restored import reason_not_to_run
from calotype_server.types import Lora, SchedulerInfo, Sigmas, Speed, TimestepSpacing
from support.engine.fake_engine import MODEL
from support.service import LIMITS
from support.state.fixture import fixture_records


@pytest.mark.parametrize(("schedulers", "runs"), [((), False), (("DDIMScheduler",), True)])
def test_a_fast_generation_needs_a_server_that_offers_it(schedulers: tuple[str, ...], runs: bool) -> None:
    """A stored FAST generation ends with one violation if the server no longer offers FAST, and runs otherwise."""
    record = replace(fixture_records()[0], end=None)
    job = replace(record.job, speed=Speed.FAST, scheduler="DDIMScheduler", width=64, height=64, step_count=20)
    stored = StoredGeneration(replace(record, job=job), None, replaced=False)
    error = reason_not_to_run(stored, replace(MODEL, fast_schedulers=schedulers), LIMITS)
    if runs:
        assert error is None
    else:
        assert isinstance(error, errors.InvalidRequest)
        assert [violation.field for violation in error.violations] == ["speed"]


@pytest.mark.parametrize(
    ("size", "output", "reason"),
    [
        ((64, 64), None, None),
        ((64, 64), (100, 90), None),
        ((64, 64), (300, 300), "times height_px is 90000 pixels, the maximum is 65536, since the server restarted"),
        ((96, 64), None, "96x64 is not a size that the model supports, since the server restarted"),
    ],
)
def test_a_size_must_still_be_supported(
    size: tuple[int, int], output: tuple[int, int] | None, reason: str | None
) -> None:
    """A generation ends with a violation if this model does not draw its size, or if its image is too large."""
    record = replace(fixture_records()[0], end=None)
    options = replace(record.job.output, size=output)
    job = replace(record.job, width=size[0], height=size[1], step_count=4, scheduler="DDIMScheduler", output=options)
    restored = parse_record(dump_record(replace(record, job=job)))
    assert restored.job == job
    model = replace(MODEL, sizes=((64, 64),), min_pixels=0)
    limits = replace(LIMITS, max_output_pixels=256 * 256)
    error = reason_not_to_run(StoredGeneration(restored, None, replaced=False), model, limits)
    if reason is None:
        assert error is None
    else:
        assert isinstance(error, errors.InvalidRequest)
        assert [each.description for each in error.violations] == [reason]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"scheduler": "Euler"}, None),
        ({"scheduler": "Euler", "sigmas": Sigmas.KARRAS}, None),
        ({"scheduler": "DPM++ 2M"}, "scheduler"),
        ({"scheduler": "Euler", "sigmas": Sigmas.BETA}, "sigmas"),
        ({"scheduler": "Euler", "spacing": TimestepSpacing.LINSPACE}, "spacing"),
    ],
)
def test_a_stored_choice_needs_a_server_that_offers_it(options: dict, field: str | None) -> None:
    """A stored alias, noise levels and spacing run again only if the scheduler still supports them."""
    record = replace(fixture_records()[0], end=None)
    job = replace(record.job, width=64, height=64, step_count=4, **options)
    info = SchedulerInfo("EulerDiscreteScheduler", ("Euler",), (Sigmas.KARRAS,), (TimestepSpacing.TRAILING,))
    model = replace(MODEL, schedulers=(info.name,), scheduler_details=(info,))
    error = reason_not_to_run(StoredGeneration(replace(record, job=job), None, replaced=False), model, LIMITS)
    found = [violation.field for violation in error.violations] if isinstance(error, errors.InvalidRequest) else []
    assert found == ([] if field is None else [field])


@pytest.mark.parametrize(("loras", "runs"), [((), False), (("other",), False), (("other", "style"), True)])
def test_a_generation_needs_its_loras(loras: tuple[str, ...], runs: bool) -> None:
    """A stored generation ends with one violation if the server no longer has one of its LoRAs, and runs otherwise."""
    record = replace(fixture_records()[0], end=None)
    job = replace(
        record.job, loras=(Lora("style", 0.5),), scheduler="DDIMScheduler", width=64, height=64, step_count=20
    )
    record = parse_record(dump_record(replace(record, job=job)))
    assert record.job.loras == (Lora("style", 0.5),)
    stored = StoredGeneration(record, None, replaced=False)
    error = reason_not_to_run(stored, replace(MODEL, loras=loras), LIMITS)
    if runs:
        assert error is None
    else:
        assert isinstance(error, errors.InvalidRequest)
        assert [violation.field for violation in error.violations] == ["loras.0.name"]
