"""New generations get everything they need, or use up nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from calotype_server import errors
from calotype_server.auth.quotas import Quota, QuotaLimits
from calotype_server.generations.store import Store
from calotype_server.types import DeliveryOptions, Job
from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime

if TYPE_CHECKING:
    from pathlib import Path

JOB = Job("a cat", None, 64, 64, 4, 3.0, 0, "DDIMScheduler")


async def test_generations_that_cannot_be_stored_are_not_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one of several generations cannot be written to disk, all end, and the quota is as before."""
    store, engine = await Store.open(tmp_path), FakeEngine()
    engine.hold()
    accept, writes = store.accept, []

    async def fail_at_the_second(record) -> None:
        writes.append(record)
        if len(writes) == 2:
            raise errors.StateUnavailable("The disk is full.")
        await accept(record)

    monkeypatch.setattr(store, "accept", fail_at_the_second)
    quota = Quota(QuotaLimits(requests_per_minute=3))
    async with running_runtime(engine, store=store, max_queue=9) as runtime:
        requests = [(JOB, DeliveryOptions(caller="a"))] * 3
        with pytest.raises(errors.StateUnavailable):
            async with runtime.generations.start_all(requests, quota):
                pass
        engine.allow()
        for generation in runtime.generations.running:
            await generation.finished()
        assert runtime.admission.active + runtime.admission.waiting == 0
        async with runtime.generations.start_all(requests, quota) as readers:
            assert len(readers) == 3
    await store.close()


async def test_known_request_ids_are_followed_and_only_the_others_count() -> None:
    """Of several requests, one was started earlier: it gets a reader, and the quota is charged for the other."""
    engine = FakeEngine()
    engine.hold()
    quota = Quota(QuotaLimits(requests_per_minute=2))
    async with running_runtime(engine, max_queue=9) as runtime:
        known = JOB, DeliveryOptions(caller="a", request_id="known")
        async with (
            runtime.generations.start(*known, quota) as first,
            runtime.generations.start_all([known, (JOB, DeliveryOptions(caller="a"))], quota) as (again, new),
        ):
            assert again.generation is first.generation
            assert new.generation is not first.generation
            assert len(runtime.generations.running) == 2
            engine.allow()
