"""Connections that drop at every phase and step, on every transport, with each policy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Caller
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running

if TYPE_CHECKING:
    from support.service import Service

STEPS = 3
MOMENTS = ["queued", *range(STEPS), "decoding"]
"""When the connection drops: in the queue, after this many steps, or while decoding."""


async def drop_at(moment: str | int, service: Service, engine: FakeEngine, **options) -> tuple[str, list]:
    """Starts a generation, drops its connection at a moment, and returns its id and the other running calls."""
    others = []
    if moment == "queued":
        others.append(service.stub.Generate(pb.GenerateRequest(prompt="first", seed=1, step_count=1)))
        await read_until(others[0], pb.PHASE_DENOISING)
    call = service.stub.Generate(pb.GenerateRequest(prompt="a red apple", seed=7, step_count=STEPS, **options))
    message = await call.read()
    if moment == "decoding":
        engine.decoding.clear()
        engine.allow(STEPS)
        message = await read_until(call, pb.PHASE_DECODING)
    elif isinstance(moment, int):
        if moment:
            engine.allow(moment)
        while message.phase < pb.PHASE_DENOISING or message.step < moment:
            message = await call.read()
    call.cancel()
    await wait_until_disconnected(service, message.generation_id)
    return message.generation_id, others


async def wait_until_disconnected(service: Service, generation_id: str) -> None:
    """Waits until the server has noticed that the generation has no readers."""
    async with asyncio.timeout(20):
        while service.generations.find(generation_id, Caller("")).readers:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0)


def release(engine: FakeEngine) -> None:
    """Lets all generations finish."""
    engine.allow()
    engine.decoding.set()


@pytest.mark.parametrize("moment", MOMENTS)
async def test_cancel_frees_the_slot(moment: str | int, transport: str) -> None:
    """A generation without readers stops before its next step and ends as CANCELLED; the next caller is served."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport=transport) as service:
        generation_id, others = await drop_at(moment, service, engine)
        release(engine)
        await asyncio.gather(*(read_until(call, pb.PHASE_SUCCEEDED) for call in others))
        following = service.stub.Generate(pb.GenerateRequest(prompt="next", seed=8, step_count=1))
        await read_until(following, pb.PHASE_SUCCEEDED)
        watched = service.stub.Watch(pb.WatchRequest(generation_id=generation_id))
        assert (await watched.read()).phase == pb.PHASE_CANCELLED
    ran = [job.seed for job in engine.jobs]
    assert (7 in ran) == (moment != "queued")


@pytest.mark.parametrize("moment", MOMENTS)
async def test_keep_and_a_grace_period_let_a_generation_finish(moment: str | int, transport: str) -> None:
    """With KEEP, or when a reader returns within the grace period, a watcher receives the final image."""
    for options in ({"on_disconnect": pb.DISCONNECT_POLICY_KEEP}, {"disconnect_grace": Duration(seconds=600)}):
        engine = FakeEngine()
        engine.hold()
        async with running(engine, transport=transport) as service:
            generation_id, others = await drop_at(moment, service, engine, **options)
            watched = service.stub.Watch(pb.WatchRequest(generation_id=generation_id))
            first = await watched.read()
            assert first.phase < pb.PHASE_SUCCEEDED
            release(engine)
            end = await read_until(watched, pb.PHASE_SUCCEEDED)
            assert (end.step, end.seed) == (STEPS, 7)
            assert end.sequence > first.sequence
            await asyncio.gather(*(read_until(call, pb.PHASE_SUCCEEDED) for call in others))
