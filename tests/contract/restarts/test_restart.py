"""With a state folder, generations survive a restart: ended ones can be watched, the others are run again."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Caller
from calotype_server.failpoints import injected
from calotype_server.generations.records import Record
from calotype_server.generations.store import Store
from calotype_server.types import DeliveryOptions, DisconnectPolicy, Failed, Notice, Succeeded
from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime
from support.service import read_until, running
from support.state.folders import JOB, crashed, opened

KEEP = pb.DISCONNECT_POLICY_KEEP


async def test_an_ended_generation_can_be_watched_after_a_restart(tmp_path) -> None:
    """A watcher gets the same image and warnings under the same generation id and request id."""
    named = pb.GenerateRequest(prompt="a red apple", seed=7, request_id="mine")
    store, engine = await Store.open(tmp_path), FakeEngine()
    engine.notices, engine.late_notices = (
        (Notice("PROMPT_TRUNCATED", "Long."),),
        (Notice("DECODED_IN_TILES", "Tiled."),),
    )
    async with running(engine, store=store) as service:
        before = await read_until(service.stub.Generate(named), pb.PHASE_SUCCEEDED)
    await store.close()
    store, engine = await Store.open(tmp_path), FakeEngine()
    async with running(engine, store=store) as service:
        watched = service.stub.Watch(pb.WatchRequest(generation_id=before.generation_id))
        after = await read_until(watched, pb.PHASE_SUCCEEDED)
        again = await read_until(service.stub.Generate(named), pb.PHASE_SUCCEEDED)
    await store.close()
    assert (after.image, after.seed, after.step) == (before.image, before.seed, before.step)
    assert [each.reason for each in after.warnings] == ["PROMPT_TRUNCATED", "DECODED_IN_TILES"]
    assert again.generation_id == before.generation_id
    assert not engine.jobs


async def test_unfinished_generations_run_again_after_a_restart(tmp_path) -> None:
    """One was running and one was queued when the server stopped; both end after the restart, in order."""
    store, engine = await Store.open(tmp_path), FakeEngine()
    engine.hold()
    ids = []
    async with running(engine, store=store) as service:
        for seed in (1, 2):
            call = service.stub.Generate(pb.GenerateRequest(prompt="a", seed=seed, on_disconnect=KEEP))
            ids.append((await call.read()).generation_id)
    await store.close()
    store, engine = await Store.open(tmp_path), FakeEngine()
    async with running(engine, store=store) as service:
        for generation_id, seed in zip(ids, (1, 2), strict=True):
            watched = service.stub.Watch(pb.WatchRequest(generation_id=generation_id, after_sequence=99))
            assert (await read_until(watched, pb.PHASE_SUCCEEDED)).seed == seed
    await store.close()
    assert [job.seed for job in engine.jobs] == [1, 2]


async def test_a_cancelled_generation_stays_cancelled(tmp_path) -> None:
    """A restart does not run a generation again that its caller cancelled."""
    store, engine = await Store.open(tmp_path), FakeEngine()
    engine.hold()
    async with running(engine, store=store) as service:
        call = service.stub.Generate(pb.GenerateRequest(prompt="a", seed=1))
        message = await read_until(call, pb.PHASE_DENOISING)
        await service.stub.Cancel(pb.CancelRequest(generation_id=message.generation_id))
        engine.allow()
        with pytest.raises(grpc.aio.AioRpcError):
            await read_until(call, pb.PHASE_SUCCEEDED)
    await store.close()
    store, engine = await Store.open(tmp_path), FakeEngine()
    async with running(engine, store=store) as service:
        watched = service.stub.Watch(pb.WatchRequest(generation_id=message.generation_id))
        assert (await watched.read()).phase == pb.PHASE_CANCELLED
    await store.close()
    assert not engine.jobs


async def start(service, *seeds: int) -> list[str]:
    """Starts generations that continue without a reader, and returns their ids."""
    requests = [pb.GenerateRequest(prompt="a", seed=seed, request_id=f"r{seed}", on_disconnect=KEEP) for seed in seeds]
    return [(await service.stub.Generate(request).read()).generation_id for request in requests]


async def end_of(service, generation_id: str) -> pb.Progress:
    """Returns the last message of a generation."""
    last, call = None, service.stub.Watch(pb.WatchRequest(generation_id=generation_id))
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for message in call:
            last = message
    return last


async def test_a_smaller_server_loses_no_generation(tmp_path) -> None:
    """With one slot and no queue instead of 2 and 6, all accepted generations of a caller still get their images."""
    engine = FakeEngine()
    engine.hold()
    async with opened(tmp_path) as store, running(engine, store=store, max_active=2, max_queue=6) as service:
        ids = await start(service, *range(8))
    async with opened(tmp_path) as store, running(FakeEngine(), store=store, max_active=1, max_queue=0) as service:
        ends = [await end_of(service, generation_id) for generation_id in ids]
    assert [(end.phase, end.seed) for end in ends] == [(pb.PHASE_SUCCEEDED, seed) for seed in range(8)]


async def test_a_generation_beyond_the_new_limits_ends_visibly(tmp_path) -> None:
    """After limits were lowered and a scheduler was removed, callers see why their image was not made."""
    engine = FakeEngine()
    engine.hold()
    async with opened(tmp_path) as store, running_runtime(engine, store=store, max_queue=8) as runtime:
        jobs = [JOB, replace(JOB, width=2048), replace(JOB, step_count=60), replace(JOB, scheduler="OldScheduler")]
        ids = []
        for job in jobs:
            options = DeliveryOptions(on_disconnect=DisconnectPolicy.KEEP)
            async with runtime.generations.start(job, options) as reader:
                ids.append(reader.generation.id)
    outcomes = []
    for _ in range(2):
        async with (
            opened(tmp_path) as store,
            running_runtime(FakeEngine(), store=store, max_pixels=256 * 256, max_step_count=50) as runtime,
        ):
            await runtime.generations.idle()
            states = [runtime.generations.find(each, Caller("")).events.state for each in ids]
            outcomes.append([getattr(state.end, "error", None) for state in states])
    for succeeded, *rejected in outcomes:
        assert succeeded is None
        assert [error.reason for error in rejected] == ["INVALID_REQUEST"] * 3
        assert [[each.field for each in error.violations] for error in rejected] == [
            ["width_px"],
            ["step_count"],
            ["scheduler"],
        ]


async def test_a_repeated_request_does_not_run_twice_after_a_crash(tmp_path) -> None:
    """A generation was abandoned and its request repeated; the process ended before the first end was stored."""
    delivery = DeliveryOptions(request_id="mine", on_disconnect=DisconnectPolicy.KEEP)
    async with opened(tmp_path) as store:
        ids = [f"{store.replica}.{name}" for name in ("first", "second")]
        for created, generation_id in enumerate(ids):
            await store.accept(Record(generation_id, JOB, delivery, created))
    engine = FakeEngine()
    async with opened(tmp_path) as store, running_runtime(engine, store=store) as runtime:
        await asyncio.gather(*(each.finished() for each in runtime.generations.running))
        first, second = (runtime.generations.find(each, Caller("")) for each in ids)
        assert isinstance(first.events.state.end, Failed)
        assert first.events.state.end.error.reason == "ABANDONED"
        assert isinstance(second.events.state.end, Succeeded)
        async with runtime.generations.start(JOB, delivery) as reader:
            assert reader.generation is second
    assert len(engine.jobs) == 1


class TestEndThatCannotBeStored:
    """A full disk at the end of a generation: the caller gets the image, and knows that it is not stored."""

    @pytest.fixture(autouse=True)
    def short_patience(self, monkeypatch) -> None:
        """Callers wait only briefly for a failing write."""
        monkeypatch.setattr("calotype_server.generations.state_writer._PATIENCE_SECONDS", 0.05)

    @staticmethod
    def full() -> None:
        """Fails as a full disk does."""
        raise OSError(28, "No space left on device")

    async def test_the_image_is_delivered_as_not_persisted(self, tmp_path) -> None:
        """The last message says so; a crash runs the generation again, and then the end is stored."""
        async with opened(tmp_path / "state") as store, running(FakeEngine(), store=store) as service:
            with injected("store.end", self.full):
                [generation_id] = await start(service, 7)
                first = await end_of(service, generation_id)
                folder = crashed(tmp_path / "state", tmp_path / "crashed")
        async with opened(folder) as store, running(FakeEngine(), store=store) as service:
            second = await end_of(service, generation_id)
        assert (first.phase, first.not_persisted) == (pb.PHASE_SUCCEEDED, True)
        assert (second.phase, second.not_persisted) == (pb.PHASE_SUCCEEDED, False)
        assert second.image == first.image

    async def test_the_state_catches_up_when_the_disk_has_space(self, tmp_path) -> None:
        """The write is repeated in the background, so the end survives a later restart."""
        async with opened(tmp_path) as store, running(FakeEngine(), store=store) as service:
            with injected("store.end", self.full):
                [generation_id] = await start(service, 7)
                assert (await end_of(service, generation_id)).not_persisted
        engine = FakeEngine()
        async with opened(tmp_path) as store, running(engine, store=store) as service:
            assert not (await end_of(service, generation_id)).not_persisted
        assert not engine.jobs

    async def test_the_slot_is_free_while_the_write_is_repeated(self, tmp_path) -> None:
        """The next generation runs although the end of the first one is not stored yet."""
        engine, failed = FakeEngine(), threading.Event()
        engine.hold()

        def fail_once() -> None:
            if not failed.is_set():
                failed.set()
                raise OSError(28, "No space left on device")

        async with opened(tmp_path) as store, running(engine, store=store) as service:
            ids = await start(service, 1, 2)
            with injected("store.end", fail_once):
                engine.allow()
                ends = [await end_of(service, each) for each in ids]
        assert [end.phase for end in ends] == [pb.PHASE_SUCCEEDED] * 2

    async def test_new_generations_are_rejected_before_they_are_accepted(self, tmp_path) -> None:
        """After a failed write, a call gets STATE_UNAVAILABLE at once and takes no place in the queue."""
        engine = FakeEngine()
        async with opened(tmp_path) as store, running(engine, store=store) as service:
            with injected("store.end", self.full):
                [generation_id] = await start(service, 7)
                await end_of(service, generation_id)
                assert store.problem == "The server cannot access its state right now."
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await start(service, 8)
            assert (await end_of(service, generation_id)).phase == pb.PHASE_SUCCEEDED
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert [job.seed for job in engine.jobs] == [7]
        async with opened(tmp_path) as store:
            assert [record.job.seed for record in await store.load()] == [7]


async def test_a_generation_that_was_not_accepted_does_not_hide_the_problem(tmp_path) -> None:
    """The failed write of one call rejects the next one early, also after the rejected generation has ended."""
    async with opened(tmp_path) as store, running(FakeEngine(), store=store) as service:
        with injected("store.accept", TestEndThatCannotBeStored.full):
            with pytest.raises(grpc.aio.AioRpcError):
                await start(service, 1)
            await service.generations.idle()
            assert store.problem is not None


async def test_a_disk_without_room_for_an_image_rejects_new_generations(tmp_path, monkeypatch) -> None:
    """The free space must hold the image of every accepted generation, in the file and in its log."""
    engine = FakeEngine()
    engine.hold()
    async with opened(tmp_path) as store, running(engine, store=store, max_queue=9) as service:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_900_000))
        await start(service, 1, 2)
        large = pb.GenerateRequest(prompt="a", width_px=256, height_px=256)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Generate(large).read()
        assert store.problem == "The server's disk has no room for another image."
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "no room" in caught.value.details()
