"""Who goes first, over a real socket: several slots, priorities, and what the model says about them."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running


def request(seed: int, priority: pb.Priority.ValueType = pb.PRIORITY_INTERACTIVE) -> pb.GenerateRequest:
    """One that the engine's list of jobs tells apart."""
    return pb.GenerateRequest(prompt="a red apple", seed=seed, priority=priority)


async def test_as_many_run_at_once_as_there_are_slots() -> None:
    """Two of three denoise, the third is told that it is next."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, max_active=2) as service:
        calls = [service.stub.Generate(request(seed)) for seed in range(2)]
        for call in calls:
            await read_until(call, pb.PHASE_DENOISING)
        third = service.stub.Generate(request(2))
        assert (await third.read()).queue_position == 1
        engine.allow()
        for call in [*calls, third]:
            await read_until(call, pb.PHASE_SUCCEEDED)
    assert engine.most_active == 2


async def test_interactive_overtakes_batch_and_both_are_told() -> None:
    """What was first in the queue moves back to the second place when somebody comes who waits in person."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        running_call = service.stub.Generate(request(1))
        await read_until(running_call, pb.PHASE_DENOISING)
        batch = service.stub.Generate(request(2, pb.PRIORITY_BATCH))
        assert (await batch.read()).queue_position == 1
        person = service.stub.Generate(request(3))
        assert (await person.read()).queue_position == 1
        assert (await batch.read()).queue_position == 2
        engine.allow()
        await asyncio.gather(*(read_until(call, pb.PHASE_SUCCEEDED) for call in (running_call, person, batch)))
    assert [job.seed for job in engine.jobs] == [1, 3, 2]


async def test_an_unknown_priority_is_named() -> None:
    """A number that this server does not know is refused, not taken for the default."""
    async with running(FakeEngine()) as service:
        with pytest.raises(grpc.aio.AioRpcError, match="priority: is 9") as caught:
            await service.stub.Generate(request(1, 9)).read()  # type: ignore[arg-type]
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
