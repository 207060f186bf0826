"""Slots and priorities, over a real socket."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from support.engine.fake_engine import FakeEngine
from support.keyring import Keyring
from support.service import read_until, running

if TYPE_CHECKING:
    from pathlib import Path


def request(seed: int, priority: pb.Priority.ValueType = pb.PRIORITY_INTERACTIVE) -> pb.GenerateRequest:
    """Returns a request with a seed that identifies its job."""
    return pb.GenerateRequest(prompt="a red apple", seed=seed, priority=priority)


async def test_as_many_generations_run_as_there_are_slots() -> None:
    """Two of three generations denoise; the third has queue position 1."""
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


async def test_interactive_requests_overtake_batch_requests() -> None:
    """When an interactive request arrives, the batch request moves back to position 2 and receives it."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        running_call = service.stub.Generate(request(1))
        await read_until(running_call, pb.PHASE_DENOISING)
        batch = service.stub.Generate(request(2, pb.PRIORITY_BATCH))
        assert (await batch.read()).queue_position == 1
        interactive = service.stub.Generate(request(3))
        assert (await interactive.read()).queue_position == 1
        assert (await batch.read()).queue_position == 2
        engine.allow()
        await asyncio.gather(*(read_until(call, pb.PHASE_SUCCEEDED) for call in (running_call, interactive, batch)))
    assert [job.seed for job in engine.jobs] == [1, 3, 2]


@pytest.mark.parametrize("slots", [1, 3])
async def test_one_key_cannot_keep_others_out(tmp_path: Path, slots: int) -> None:
    """A key that sends as much as it can fills neither the queue nor, if there are several, all slots.

    With several slots, another key's image starts at once; with one, it is the next.
    """
    keyring = Keyring(tmp_path / "keys.toml")
    for name in ("alice", "bob"):
        keyring.add(name)
    engine = FakeEngine()
    engine.hold()
    settings = {"max_queue_per_caller": None, "api_keys": keyring.path}
    async with running(engine, max_active=slots, max_queue=8, access=keyring.access(), settings=settings) as service:
        hog = [service.stub.Generate(request(seed), metadata=keyring.metadata("alice")) for seed in range(20)]
        answers = await asyncio.gather(*(call.read() for call in hog), return_exceptions=True)
        rejected = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert {error.code() for error in rejected} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert (service.admission.active, service.admission.waiting) == (max(1, slots - 1), 4)
        other = service.stub.Generate(request(99), metadata=keyring.metadata("bob"))
        if slots > 1:
            await read_until(other, pb.PHASE_DENOISING)
        else:
            assert (await other.read()).queue_position == 1
        engine.allow()
        await read_until(other, pb.PHASE_SUCCEEDED)
        assert [job.seed for job in engine.jobs].index(99) <= slots
        for call in hog:
            call.cancel()


async def test_an_unknown_priority_is_rejected() -> None:
    """An unknown enum number is an error that names the field; it is not treated as the default."""
    async with running(FakeEngine()) as service:
        with pytest.raises(grpc.aio.AioRpcError, match="priority: has the unknown value 9") as caught:
            await service.stub.Generate(request(1, 9)).read()  # type: ignore[arg-type]
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
