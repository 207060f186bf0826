"""Which stored generations run again after a restart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calotype_server import errors
from calotype_server.generations.index import StoredGeneration
from calotype_server.generations.records import dump_record, parse_record
from calotype_server.generations.restored import reason_not_to_run
from calotype_server.types import Lora, Speed
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
