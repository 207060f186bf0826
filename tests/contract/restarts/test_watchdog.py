"""A stalled model: callers on every port get a typed end before the process exits."""

from __future__ import annotations

import asyncio

import grpc

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Caller
from calotype_server.generations.store import Store
from calotype_server.generations.watchdog import EXIT_STALLED, Watchdog, end_when_stalled
from calotype_server.types import Phase
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running

PROMPT = pb.GenerateRequest(prompt="a red apple")


async def test_all_callers_get_a_typed_end_and_the_process_exits(transport: str) -> None:
    """The stalled generation ends with ENGINE_STALLED, the queued one with DRAINING, and health is NOT_SERVING."""
    engine, exit_codes = FakeEngine(), []
    async with running(engine, transport=transport) as service:
        first = await read_until(service.stub.Generate(PROMPT), pb.PHASE_SUCCEEDED)
        engine.hold()
        stuck = service.stub.Generate(PROMPT)
        await stuck.read()
        waiting = service.stub.Generate(PROMPT)
        await waiting.read()
        # The first generation has released four of these.
        for _ in range(5):
            assert await asyncio.to_thread(engine.at_step.acquire, timeout=20)

        async def shut_down(stalls) -> None:
            await service.services.set_serving(False)
            await service.generations.abort_stalled([stall.generation for stall in stalls])

        watchdog = Watchdog(lambda: service.generations.running, lambda _: None, 120.0)
        # Without elapsed time there is no stall.
        assert not watchdog.check(0) + watchdog.check(100)
        watchdog.watch = lambda: asyncio.sleep(0, watchdog.check(21))  # type: ignore[assignment, misc]
        watching = asyncio.create_task(end_when_stalled(watchdog, shut_down, exit_codes.append))
        for call, reason, code in (
            (stuck, "ENGINE_STALLED", grpc.StatusCode.INTERNAL),
            (waiting, "DRAINING", grpc.StatusCode.UNAVAILABLE),
        ):
            end = await read_until(call, pb.PHASE_FAILED)
            assert end.error.reason == reason
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                assert error.code() is code
        await watching
        assert exit_codes == [EXIT_STALLED]
        assert not service.services.serving
        kept = service.stub.Watch(pb.WatchRequest(generation_id=first.generation_id))
        assert (await read_until(kept, pb.PHASE_SUCCEEDED)).image == first.image
        engine.allow()


async def test_a_stalled_generation_is_not_run_again_after_a_restart(tmp_path) -> None:
    """Otherwise one bad request would stall every restarted server. Other generations run again."""
    engine, store = FakeEngine(), await Store.open(tmp_path)
    engine.hold()
    async with running(engine, store=store) as service:
        ids = [await read_id(service.stub.Generate(PROMPT)) for _ in range(2)]
        assert await asyncio.to_thread(engine.at_step.acquire, timeout=20)
        await service.generations.abort_stalled([service.generations.find(ids[0], Caller(""))])
        engine.allow()
    await store.close()
    store = await Store.open(tmp_path)
    try:
        async with running(FakeEngine(), store=store) as service:
            ends = [await end_of(service, generation_id) for generation_id in ids]
    finally:
        await store.close()
    assert ends == [Phase.FAILED, Phase.SUCCEEDED]


async def read_id(call) -> str:
    """Returns the id of a generation after it has been accepted."""
    return (await call.read()).generation_id


async def end_of(service, generation_id: str) -> Phase:
    """Waits for a generation's end and returns its phase."""
    generation = service.generations.find(generation_id, Caller(""))
    async with service.generations.follow(generation) as reader:
        async for update, _ in reader:
            phase = update.state.phase
    return phase


async def test_the_first_generation_of_a_size_is_marked() -> None:
    """The second generation of a size is not marked; the first of another size is."""
    engine = FakeEngine()
    async with running(engine) as service:
        seen = []
        for width in (64, 64, 72):
            request = pb.GenerateRequest(prompt="a", width_px=width)
            end = await read_until(service.stub.Generate(request), pb.PHASE_SUCCEEDED)
            seen.append(service.generations.find(end.generation_id, Caller("")).first_of_its_size)
    assert seen == [True, False, True]
