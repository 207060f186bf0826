"""Generations and their readers on every transport: watch, cancel, finish, list and disconnects."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Caller
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from support.service import Service

KEEP = pb.DISCONNECT_POLICY_KEEP
STEPS = 4


@pytest.fixture
def engine() -> FakeEngine:
    """An engine that waits before each step until the test allows it."""
    engine = FakeEngine()
    engine.hold()
    return engine


@pytest.fixture
async def service(engine: FakeEngine, transport: str) -> AsyncIterator[Service]:
    """A server with this engine, on each transport."""
    async with running(engine, transport=transport) as service:
        yield service


def request(**changes) -> pb.GenerateRequest:
    """Returns a request with four steps."""
    return pb.GenerateRequest(prompt="a red apple", seed=7, step_count=STEPS, **changes)


async def read_to_step(call, step: int) -> pb.Progress:
    """Reads until the first message of a step, and returns it."""
    while (message := await call.read()).step < step:
        assert message.phase < pb.PHASE_SUCCEEDED
    return message


async def read_all(call) -> list[pb.Progress]:
    """Reads the rest of a stream that ends with OK."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def read_end(call) -> pb.Progress:
    """Returns the last message of a stream that ends with OK."""
    return (await read_all(call))[-1]


async def test_a_watcher_gets_the_newest_preview_and_everything_after(service: Service, engine: FakeEngine) -> None:
    """A reader that joins later gets the current preview at once, then the rest, then the same final image."""
    call = service.stub.Generate(request())
    engine.allow(2)
    second = await read_to_step(call, 2)
    watcher = service.stub.Watch(pb.WatchRequest(generation_id=second.generation_id))
    replayed = await watcher.read()
    assert (replayed.image_step, replayed.image) == (second.image_step, second.image)
    engine.allow()
    mine, theirs = await asyncio.gather(read_end(call), read_end(watcher))
    assert (mine.sequence, mine.image) == (theirs.sequence, theirs.image)
    assert theirs.phase == pb.PHASE_SUCCEEDED


async def test_a_watcher_gets_only_messages_after_its_sequence(service: Service, engine: FakeEngine) -> None:
    """With `after_sequence`, messages and previews that the caller has seen are not sent again."""
    call = service.stub.Generate(request(on_disconnect=KEEP))
    engine.allow(2)
    seen = await read_to_step(call, 2)
    call.cancel()
    await wait_for_readers(service, seen.generation_id, 0)
    watcher = service.stub.Watch(pb.WatchRequest(generation_id=seen.generation_id, after_sequence=seen.sequence))
    first = asyncio.ensure_future(watcher.read())
    await wait_for_readers(service, seen.generation_id, 1)
    engine.allow()
    messages = [await first, *await read_all(watcher)]
    assert all(message.sequence > seen.sequence for message in messages)
    assert messages[-1].phase == pb.PHASE_SUCCEEDED
    assert seen.image_step not in [message.image_step for message in messages[:-1]]


async def test_a_kept_generation_continues_without_readers(service: Service, engine: FakeEngine) -> None:
    """With KEEP, the reader disconnects at the first step, and later watchers still get the image."""
    call = service.stub.Generate(request(on_disconnect=KEEP))
    engine.allow(1)
    generation_id = (await read_to_step(call, 1)).generation_id
    call.cancel()
    engine.allow()
    await service.generations.idle()
    for _ in range(2):
        end = await read_end(service.stub.Watch(pb.WatchRequest(generation_id=generation_id)))
        assert (end.phase, end.step) == (pb.PHASE_SUCCEEDED, STEPS)
        assert end.image


async def test_a_generation_is_cancelled_when_its_last_reader_disconnects(service: Service, engine: FakeEngine) -> None:
    """With CANCEL, the first of two readers may disconnect; when the second does, the generation stops."""
    call = service.stub.Generate(request())
    engine.allow(1)
    generation_id = (await read_to_step(call, 1)).generation_id
    watcher = service.stub.Watch(pb.WatchRequest(generation_id=generation_id))
    await watcher.read()
    call.cancel()
    await wait_for_readers(service, generation_id, 1)
    assert not engine.stops[0].is_set()
    watcher.cancel()
    assert await asyncio.to_thread(engine.stops[0].wait, 20)


async def test_a_reader_that_returns_within_the_grace_period_resumes(service: Service, engine: FakeEngine) -> None:
    """The generation is not cancelled if a new reader arrives within the grace period."""
    call = service.stub.Generate(request(disconnect_grace=Duration(seconds=600)))
    engine.allow(1)
    generation_id = (await read_to_step(call, 1)).generation_id
    call.cancel()
    await wait_for_readers(service, generation_id, 0)
    watcher = service.stub.Watch(pb.WatchRequest(generation_id=generation_id))
    engine.allow()
    assert (await read_end(watcher)).phase == pb.PHASE_SUCCEEDED
    assert not engine.stops[0].is_set()


async def test_a_generation_is_cancelled_after_the_grace_period(service: Service, engine: FakeEngine) -> None:
    """If no reader returns in time, the engine stops."""
    call = service.stub.Generate(request(disconnect_grace=Duration(nanos=1_000_000)))
    await read_until(call, pb.PHASE_DENOISING)
    call.cancel()
    assert await asyncio.to_thread(engine.stops[0].wait, 20)


async def test_the_request_id_of_an_abandoned_generation_starts_a_new_one(service: Service, engine: FakeEngine) -> None:
    """After a generation lost its last reader, its request id starts another generation with a new id."""
    call = service.stub.Generate(request(request_id="mine"))
    first = await read_until(call, pb.PHASE_DENOISING)
    call.cancel()
    await wait_for_readers(service, first.generation_id, 0)
    again = service.stub.Generate(request(request_id="mine"))
    await again.read()
    engine.allow()
    assert (await read_until(again, pb.PHASE_SUCCEEDED)).generation_id != first.generation_id
    end = await service.stub.Watch(pb.WatchRequest(generation_id=first.generation_id)).read()
    assert (end.phase, end.error.reason) == (pb.PHASE_CANCELLED, "ABANDONED")
    # The older one ended later and must not take the request id back.
    once_more = await read_until(service.stub.Generate(request(request_id="mine")), pb.PHASE_SUCCEEDED)
    assert once_more.generation_id != first.generation_id


async def test_the_request_id_of_a_cancelled_generation_returns_its_end(service: Service, engine: FakeEngine) -> None:
    """A generation that its caller cancelled is not started again by the same request id."""
    call = service.stub.Generate(request(request_id="mine"))
    first = await read_until(call, pb.PHASE_DENOISING)
    await service.stub.Cancel(pb.CancelRequest(generation_id=first.generation_id))
    again = service.stub.Generate(request(request_id="mine"))
    engine.allow()
    end = await read_until(again, pb.PHASE_CANCELLED)
    assert (end.generation_id, end.error.reason) == (first.generation_id, "CANCELLED")


async def wait_for_readers(service: Service, generation_id: str, count: int) -> None:
    """Waits until the generation has this many readers."""
    async with asyncio.timeout(20):
        while service.generations.find(generation_id, Caller("")).readers != count:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0)


async def test_finish_ends_with_the_current_estimate(service: Service, engine: FakeEngine) -> None:
    """After the current step, the estimate becomes the final image, with the number of its step."""
    call = service.stub.Generate(request())
    engine.allow(1)
    generation_id = (await read_to_step(call, 1)).generation_id
    answer = await service.stub.Finish(pb.FinishRequest(generation_id=generation_id))
    assert answer.phase == pb.PHASE_DENOISING
    engine.allow(1)
    end = await read_end(call)
    assert (end.phase, end.step, end.total_steps, end.finished_early) == (pb.PHASE_SUCCEEDED, 2, STEPS, True)
    assert end.image
    again = await service.stub.Finish(pb.FinishRequest(generation_id=generation_id))
    assert again.phase == pb.PHASE_SUCCEEDED


async def test_the_same_request_id_never_starts_twice(service: Service, engine: FakeEngine) -> None:
    """During and after the generation, calls with its request id follow it, even if the server chose the seed."""
    named = pb.GenerateRequest(prompt="a red apple", step_count=STEPS, request_id="mine")
    first, second = service.stub.Generate(named), service.stub.Generate(named)
    engine.allow()
    ends = [*await asyncio.gather(read_end(first), read_end(second)), await read_end(service.stub.Generate(named))]
    assert len({end.generation_id for end in ends}) == 1
    assert len({end.image for end in ends}) == 1
    assert len(engine.jobs) == 1


async def test_a_request_id_with_other_parameters_is_rejected(service: Service, engine: FakeEngine) -> None:
    """ALREADY_EXISTS names the fields that differ, and the first generation is not affected."""
    first = service.stub.Generate(request(request_id="mine"))
    await read_until(first, pb.PHASE_DENOISING)
    other = pb.GenerateRequest(prompt="a green apple", seed=8, step_count=STEPS, request_id="mine")
    with pytest.raises(grpc.aio.AioRpcError, match="a different prompt, seed") as caught:
        await read_end(service.stub.Generate(other))
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    engine.allow()
    assert (await read_end(first)).phase == pb.PHASE_SUCCEEDED


async def test_generations_are_listed_newest_first_in_pages(service: Service, engine: FakeEngine) -> None:
    """Each of the caller's generations is listed once across pages."""
    engine.allow()
    for seed in range(3):
        await read_end(service.stub.Generate(pb.GenerateRequest(prompt=f"p{seed}", seed=seed, request_id=f"r{seed}")))
    first = await service.stub.ListGenerations(pb.ListGenerationsRequest(page_size=2))
    rest = await service.stub.ListGenerations(pb.ListGenerationsRequest(page_token=first.next_page_token))
    listed = [*first.generations, *rest.generations]
    assert [each.prompt for each in listed] == ["p2", "p1", "p0"]
    assert [each.request_id for each in listed] == ["r2", "r1", "r0"]
    assert {each.phase for each in listed} == {pb.PHASE_SUCCEEDED}
    assert listed[0].create_time.ToSeconds() > 0
    assert not rest.next_page_token


@pytest.mark.parametrize("method", ["Watch", "Cancel", "Finish"])
async def test_an_unknown_id_is_not_found(service: Service, method: str) -> None:
    """Unknown and forgotten ids are NOT_FOUND."""
    kind = {"Watch": pb.WatchRequest, "Cancel": pb.CancelRequest, "Finish": pb.FinishRequest}[method]
    call = getattr(service.stub, method)(kind(generation_id="unknown"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (read_all(call) if method == "Watch" else call)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_the_oldest_end_is_forgotten_above_the_limit() -> None:
    """A forgotten generation is NOT_FOUND, and its request id can be used again."""
    engine = FakeEngine()
    async with running(engine, retained=1) as service:
        old, new = [
            await read_end(service.stub.Generate(pb.GenerateRequest(prompt="a", seed=seed, request_id=f"r{seed}")))
            for seed in range(2)
        ]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_end(service.stub.Watch(pb.WatchRequest(generation_id=old.generation_id)))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        kept = await read_end(service.stub.Watch(pb.WatchRequest(generation_id=new.generation_id)))
        assert kept.image == new.image
        again = await read_end(service.stub.Generate(pb.GenerateRequest(prompt="b", request_id="r0")))
        assert again.generation_id != old.generation_id


async def test_watchers_choose_their_own_preview_options(service: Service, engine: FakeEngine) -> None:
    """One watcher asks for no previews, one for every second step; the original reader is not affected."""
    call = service.stub.Generate(request())
    generation_id = (await read_until(call, pb.PHASE_DENOISING)).generation_id

    def watch(**options):
        preview = pb.PreviewOptions(**options)
        return service.stub.Watch(pb.WatchRequest(generation_id=generation_id, preview=preview))

    none, second = watch(method=pb.PREVIEW_METHOD_NONE), watch(every_steps=2)
    for watcher in (none, second):
        await watcher.read()
    steps: dict[str, list[int]] = {"call": [], "none": [], "second": []}
    for number in range(1, STEPS + 1):
        engine.allow(1)
        for name, stream in (("call", call), ("none", none), ("second", second)):
            message = await read_to_step(stream, number)
            steps[name] += [message.image_step] * bool(message.image and message.phase == pb.PHASE_DENOISING)
    assert steps["none"] == []
    assert set(steps["second"]) <= {2, 4}
    assert len(steps["call"]) >= len(steps["second"])
    engine.allow()
