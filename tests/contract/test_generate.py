"""`Generate` over a real socket, with an engine whose steps the test controls."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from calotype_server import errors
from calotype_server.api import encoding
from calotype_server.generations.event_log import State, Update
from calotype_server.types import DeliveryOptions, EncodedImage, Phase, Speed, Succeeded, Timings
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from support.service import Service

RED_APPLE = pb.GenerateRequest(prompt="a red apple", seed=7)


@pytest.fixture
def engine() -> FakeEngine:
    """An engine that runs without waiting unless the test calls `hold`."""
    return FakeEngine()


@pytest.fixture
async def service(engine: FakeEngine, transport: str) -> AsyncIterator[Service]:
    """A server with this engine and four places in the queue."""
    async with running(engine, transport=transport) as service:
        yield service


async def acquire(semaphore) -> None:
    """Acquires a semaphore in a thread, so that the event loop keeps running."""
    assert await asyncio.to_thread(semaphore.acquire, timeout=20)


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """Returns the typed details of a status, by name."""
    status = rpc_status.from_call(error)
    found = {}
    for kind in (BadRequest, ErrorInfo, RetryInfo):
        for packed in status.details:
            if packed.Is(kind.DESCRIPTOR):
                found[kind.__name__] = kind.FromString(packed.value)
    return found


async def test_a_stream_reports_progress_in_order(service: Service) -> None:
    """Sequence numbers rise, phases and steps never go back, and the last message has the PNG, the seed and timings."""
    messages = [message async for message in service.stub.Generate(RED_APPLE)]
    for before, after in itertools.pairwise(messages):
        assert after.sequence > before.sequence
        assert after.phase >= before.phase
        assert after.step >= before.step
    assert messages[0].phase == pb.PHASE_QUEUED
    assert len({message.generation_id for message in messages}) == 1
    assert {message.seed for message in messages} == {7}
    last = messages[-1]
    assert (last.phase, last.image_kind, last.chunk_count) == (pb.PHASE_SUCCEEDED, pb.IMAGE_KIND_FINAL, 1)
    assert last.image.startswith(b"\x89PNG")
    assert (last.width_px, last.height_px) == (64, 64)
    assert last.timings.total.ToNanoseconds() >= last.timings.denoising.ToNanoseconds() >= 0


async def test_a_fast_reader_gets_a_preview_of_every_step(service: Service, engine: FakeEngine) -> None:
    """When steps are released one by one, each has one JPEG, labelled with its step."""
    engine.hold()
    call = service.stub.Generate(RED_APPLE)
    shown = []
    for step in (1, 2, 3, 4):
        engine.allow(1)
        while (message := await call.read()) is not grpc.aio.EOF:
            if message.image:
                break
        assert message.image.startswith(b"\xff\xd8")
        assert message.image_kind == pb.IMAGE_KIND_PREDICTED
        assert message.previews_dropped == 0
        shown.append((message.image_step, message.step >= message.image_step))
        assert step == message.image_step
    assert shown == [(step, True) for step in (1, 2, 3, 4)]


async def test_the_first_message_arrives_before_the_first_step(service: Service, engine: FakeEngine) -> None:
    """The caller knows the generation's id before the engine has taken a step."""
    engine.hold()
    call = service.stub.Generate(RED_APPLE)
    message = await call.read()
    assert message.generation_id
    assert message.step == 0
    call.cancel()


async def test_all_invalid_fields_are_reported_together(service: Service) -> None:
    """INVALID_ARGUMENT carries a BadRequest that names each field, and an ErrorInfo."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.stub.Generate(pb.GenerateRequest(width_px=7, seed=-2)).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = details(caught.value)
    assert [v.field for v in found["BadRequest"].field_violations] == ["prompt", "width_px", "seed"]
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == ("INVALID_REQUEST", "calotype")


async def test_a_speed_that_the_model_does_not_offer_is_rejected(service: Service) -> None:
    """FAST and unknown speeds are violations of the field `speed`, over each transport."""
    unknown: Any = 9
    for speed in (pb.SPEED_FAST, unknown):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Generate(pb.GenerateRequest(prompt="a", speed=speed)).read()
        [violation] = details(caught.value)["BadRequest"].field_violations
        assert violation.field == "speed"


async def test_a_fast_generation_reports_its_computed_steps(engine: FakeEngine, transport: str) -> None:
    """The model lists the schedulers for FAST, and the final message has the number of computed steps."""
    engine.model = replace(engine.model, fast_schedulers=("DDIMScheduler",), accelerator_fallback="It failed.")
    async with running(engine, transport=transport) as service:
        model = await service.stub.GetModel(pb.GetModelRequest())
        request = pb.GenerateRequest(prompt="a", step_count=16, speed=pb.SPEED_FAST)
        last = await read_until(service.stub.Generate(request), pb.PHASE_SUCCEEDED)
    assert list(model.fast_schedulers) == ["DDIMScheduler"]
    assert (model.accelerator, model.accelerator_fallback) == ("none", "It failed.")
    assert engine.jobs[0].speed is Speed.FAST
    assert last.timings.computed_steps == engine.jobs[0].computed_step_count


async def test_queue_positions_are_sent_as_they_change(service: Service, engine: FakeEngine) -> None:
    """The second waiting caller receives position 2, then 1, then starts."""
    engine.hold()
    running_call = service.stub.Generate(RED_APPLE)
    await acquire(engine.at_step)
    second = service.stub.Generate(RED_APPLE)
    assert (await second.read()).queue_position == 1
    third = service.stub.Generate(RED_APPLE)
    assert (await third.read()).queue_position == 2
    second.cancel()
    assert (await third.read()).queue_position == 1
    engine.allow()
    assert (await read_until(third, pb.PHASE_SUCCEEDED)).queue_position == 0
    await read_until(running_call, pb.PHASE_SUCCEEDED)
    assert engine.most_active == 1


async def test_a_full_queue_rejects_with_a_retry_delay(engine: FakeEngine, transport: str) -> None:
    """The call fails immediately with RESOURCE_EXHAUSTED; generations that were accepted before still succeed."""
    engine.hold()
    async with running(engine, max_queue=1, transport=transport) as service:
        accepted = [service.stub.Generate(RED_APPLE)]
        await acquire(engine.at_step)
        accepted.append(service.stub.Generate(RED_APPLE))
        await accepted[1].read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Generate(RED_APPLE).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(caught.value)["RetryInfo"].retry_delay.ToNanoseconds() > 0
        assert details(caught.value)["ErrorInfo"].reason == "QUEUE_FULL"
        engine.allow()
        for call in accepted:
            await read_until(call, pb.PHASE_SUCCEEDED)


async def test_disconnecting_while_running_frees_the_slot(service: Service, engine: FakeEngine) -> None:
    """The run is stopped before its next step, and the next caller gets the slot."""
    engine.hold()
    call = service.stub.Generate(RED_APPLE)
    await read_until(call, pb.PHASE_DENOISING)
    await acquire(engine.at_step)
    call.cancel()
    # The engine is inside a step and stops after it.
    assert await asyncio.to_thread(engine.stops[0].wait, timeout=20)
    engine.allow(1)
    await acquire(engine.stopped)
    engine.allow()
    await read_until(service.stub.Generate(RED_APPLE), pb.PHASE_SUCCEEDED)


async def test_disconnecting_in_the_queue_frees_the_place(service: Service, engine: FakeEngine) -> None:
    """The next caller moves up, and the engine never receives the job."""
    engine.hold()
    first = service.stub.Generate(RED_APPLE)
    await acquire(engine.at_step)
    leaving = service.stub.Generate(pb.GenerateRequest(prompt="never", seed=1))
    await leaving.read()
    staying = service.stub.Generate(pb.GenerateRequest(prompt="stays", seed=2))
    await staying.read()
    leaving.cancel()
    assert (await staying.read()).queue_position == 1
    engine.allow()
    await read_until(first, pb.PHASE_SUCCEEDED)
    await read_until(staying, pb.PHASE_SUCCEEDED)
    assert [job.prompt for job in engine.jobs] == ["a red apple", "stays"]


async def test_disconnecting_while_decoding_frees_the_slot_after_the_decode(
    service: Service, engine: FakeEngine
) -> None:
    """A decode cannot be interrupted: the next caller starts when it has ended, not before."""
    engine.decoding.clear()
    call = service.stub.Generate(RED_APPLE)
    await read_until(call, pb.PHASE_DECODING)
    call.cancel()
    assert await asyncio.to_thread(engine.stops[0].wait, timeout=20)
    following = service.stub.Generate(RED_APPLE)
    assert (await following.read()).queue_position == 1
    assert engine.active == 1
    engine.decoding.set()
    await read_until(following, pb.PHASE_SUCCEEDED)
    assert engine.most_active == 1


@pytest.mark.parametrize("queued", [False, True])
async def test_cancel_ends_the_stream_with_a_typed_end(service: Service, engine: FakeEngine, queued: bool) -> None:
    """The last message and the status both say CANCELLED; cancelling twice is not an error."""
    engine.hold()
    ahead = service.stub.Generate(RED_APPLE) if queued else None
    if ahead is not None:
        await acquire(engine.at_step)
    call = service.stub.Generate(RED_APPLE)
    first = await read_until(call, pb.PHASE_QUEUED if queued else pb.PHASE_DENOISING)
    answer = await service.stub.Cancel(pb.CancelRequest(generation_id=first.generation_id))
    assert answer.phase == first.phase
    if not queued:
        engine.allow()
    end = await read_until(call, pb.PHASE_CANCELLED)
    assert (end.error.code, end.error.reason) == (1, "CANCELLED")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert details(caught.value)["ErrorInfo"].reason == "CANCELLED"
    again = await service.stub.Cancel(pb.CancelRequest(generation_id=first.generation_id))
    assert again.phase == pb.PHASE_CANCELLED
    if ahead is not None:
        engine.allow()
        await read_until(ahead, pb.PHASE_SUCCEEDED)


async def test_cancel_while_decoding_ends_as_cancelled(service: Service, engine: FakeEngine) -> None:
    """Cancel returns DECODING, so the generation must not succeed afterwards."""
    engine.decoding.clear()
    call = service.stub.Generate(RED_APPLE)
    message = await read_until(call, pb.PHASE_DECODING)
    answer = await service.stub.Cancel(pb.CancelRequest(generation_id=message.generation_id))
    assert answer.phase == pb.PHASE_DECODING
    engine.decoding.set()
    assert (await read_until(call, pb.PHASE_CANCELLED)).error.reason == "CANCELLED"


async def test_cancelling_an_unknown_generation_is_not_found(service: Service, transport: str) -> None:
    """An unknown id is NOT_FOUND; an empty one is INVALID_ARGUMENT, except in URL paths, which cannot have one."""
    empty = grpc.StatusCode.NOT_FOUND if transport == "sse" else grpc.StatusCode.INVALID_ARGUMENT
    for generation_id, code in (("unknown", grpc.StatusCode.NOT_FOUND), ("", empty)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Cancel(pb.CancelRequest(generation_id=generation_id))
        assert caught.value.code() is code


@pytest.mark.parametrize(
    ("failure", "code", "reason"),
    [
        (errors.NumericalFailure("Numbers."), grpc.StatusCode.INTERNAL, "NUMERICAL_FAILURE"),
        (errors.OutOfMemory("Memory."), grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
        (RuntimeError("secret path /etc/shadow"), grpc.StatusCode.INTERNAL, "GENERATION_FAILED"),
    ],
)
async def test_failures_are_typed_and_do_not_affect_later_calls(
    service: Service, engine: FakeEngine, failure: Exception, code: grpc.StatusCode, reason: str
) -> None:
    """The last message and the status agree and contain no secrets; the next generation succeeds."""
    engine.failure = failure
    call = service.stub.Generate(RED_APPLE)
    end = await read_until(call, pb.PHASE_FAILED)
    assert end.error.reason == reason
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is code
    assert end.error.code == code.value[0]
    assert "secret" not in caught.value.details() + end.error.message
    engine.failure = None
    await read_until(service.stub.Generate(RED_APPLE), pb.PHASE_SUCCEEDED)


async def test_a_dead_engine_is_reported_to_the_server(service: Service, engine: FakeEngine) -> None:
    """The generation fails, and the runtime signals that the engine is dead."""
    engine.failure = errors.EngineDead("The device failed.")
    await read_until(service.stub.Generate(RED_APPLE), pb.PHASE_FAILED)
    assert service.runtime.dead.is_set()


async def test_an_exceeded_deadline_stops_the_generation(service: Service, engine: FakeEngine) -> None:
    """The caller gets DEADLINE_EXCEEDED, and the engine stops."""
    engine.hold()
    await service.stub.GetModel(pb.GetModelRequest())
    call = service.stub.Generate(RED_APPLE, timeout=2)
    await acquire(engine.at_step)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_until(call, pb.PHASE_SUCCEEDED)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await asyncio.to_thread(engine.stops[0].wait, timeout=20)
    engine.allow()
    await acquire(engine.stopped)


async def test_a_slow_reader_loses_previews_but_not_the_end(engine: FakeEngine) -> None:
    """A reader that returns after the end receives the end and the number of dropped previews."""
    async with (
        running(engine) as service,
        service.generations.start(await _job(service), DeliveryOptions()) as reader,
    ):
        await anext(reader)
        with reader.generation.events.subscribe() as subscription:
            async for _ in subscription:
                pass
        rest = [update async for update, _ in reader]
    assert [update.state.phase for update in rest] == [Phase.SUCCEEDED]
    assert rest[0].previews_dropped == 4


async def _job(service: Service):
    from calotype_server.api.validation import validate
    from support.service import LIMITS

    return validate(RED_APPLE, service.generations.model, LIMITS)[0]


def test_a_large_final_image_is_split_into_chunks() -> None:
    """7 MiB are sent as three consecutive messages below 4 MiB, gRPC's default limit."""
    data = bytes(range(256)) * (7 * 1024 * 4)
    state = State(sequence=9, phase=Phase.SUCCEEDED, end=Succeeded(EncodedImage("png", 4, 4, data), Timings()))
    chunks = list(encoding.encode_update("id", 1, Update(state, None, 0), None))
    assert [(chunk.chunk_index, chunk.chunk_count) for chunk in chunks] == [(0, 3), (1, 3), (2, 3)]
    assert all(chunk.ByteSize() < 4 * 1024 * 1024 for chunk in chunks)
    assert all(chunk.phase == pb.PHASE_SUCCEEDED for chunk in chunks)
    assert b"".join(chunk.image for chunk in chunks) == data
