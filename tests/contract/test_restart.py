"""With a state folder, generations survive a restart: ended ones can be watched, the others are run again."""

from __future__ import annotations

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.generations.store import Store
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running

KEEP = pb.DISCONNECT_POLICY_KEEP


async def test_an_ended_generation_can_be_watched_after_a_restart(tmp_path) -> None:
    """A watcher gets the same image under the same generation id and request id."""
    named = pb.GenerateRequest(prompt="a red apple", seed=7, request_id="mine")
    store = await Store.open(tmp_path)
    async with running(FakeEngine(), store=store) as service:
        before = await read_until(service.stub.Generate(named), pb.PHASE_SUCCEEDED)
    await store.close()
    store, engine = await Store.open(tmp_path), FakeEngine()
    async with running(engine, store=store) as service:
        watched = service.stub.Watch(pb.WatchRequest(generation_id=before.generation_id))
        after = await read_until(watched, pb.PHASE_SUCCEEDED)
        again = await read_until(service.stub.Generate(named), pb.PHASE_SUCCEEDED)
    await store.close()
    assert (after.image, after.seed, after.step) == (before.image, before.seed, before.step)
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
