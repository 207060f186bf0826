"""A generation outlives its connection, on every transport: watch, cancel, finish, list, and who leaves."""

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
    """One whose steps happen when the test says so."""
    engine = FakeEngine()
    engine.hold()
    return engine


@pytest.fixture
async def service(engine: FakeEngine, transport: str) -> AsyncIterator[Service]:
    """A server around it, on each transport."""
    async with running(engine, transport=transport) as service:
        yield service


def request(**changes) -> pb.GenerateRequest:
    """A request of four steps."""
    return pb.GenerateRequest(prompt="a red apple", seed=7, step_count=STEPS, **changes)


async def read_to_step(call, step: int) -> pb.Progress:
    """Reads up to the first message of a step."""
    while (message := await call.read()).step < step:
        assert message.phase < pb.PHASE_SUCCEEDED
    return message


async def drain(call) -> list[pb.Progress]:
    """The rest of a stream that ends well."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def finished(call) -> pb.Progress:
    """The end of a stream that ends well."""
    return (await drain(call))[-1]


async def test_a_watcher_gets_the_newest_preview_and_everything_after(service: Service, engine: FakeEngine) -> None:
    """Whoever comes in the middle sees the picture at once, then the rest, then the same final image."""
    call = service.stub.Generate(request())
    engine.allow(2)
    second = await read_to_step(call, 2)
    watcher = service.stub.Watch(pb.WatchRequest(generation_id=second.generation_id))
    replayed = await watcher.read()
    assert (replayed.image_step, replayed.image) == (second.image_step, second.image)
    engine.allow()
    mine, theirs = await asyncio.gather(finished(call), finished(watcher))
    assert (mine.sequence, mine.image) == (theirs.sequence, theirs.image)
    assert theirs.phase == pb.PHASE_SUCCEEDED


async def test_what_a_watcher_knows_is_not_told_again(service: Service, engine: FakeEngine) -> None:
    """After the sequence that was seen, the first thing told is new."""
    call = service.stub.Generate(request(on_disconnect=KEEP))
    engine.allow(2)
    seen = await read_to_step(call, 2)
    call.cancel()
    await wait_for_readers(service, seen.generation_id, 0)
    watcher = service.stub.Watch(pb.WatchRequest(generation_id=seen.generation_id, after_sequence=seen.sequence))
    first = asyncio.ensure_future(watcher.read())
    await wait_for_readers(service, seen.generation_id, 1)
    engine.allow()
    told = [await first, *await drain(watcher)]
    assert all(message.sequence > seen.sequence for message in told)
    assert told[-1].phase == pb.PHASE_SUCCEEDED
    assert seen.image_step not in [message.image_step for message in told[:-1]]


async def test_a_generation_that_is_kept_goes_on_without_readers(service: Service, engine: FakeEngine) -> None:
    """KEEP: the reader leaves at the first step, and the picture is there for whoever asks later."""
    call = service.stub.Generate(request(on_disconnect=KEEP))
    engine.allow(1)
    generation_id = (await read_to_step(call, 1)).generation_id
    call.cancel()
    engine.allow()
    await service.generations.idle()
    for _ in range(2):
        end = await finished(service.stub.Watch(pb.WatchRequest(generation_id=generation_id)))
        assert (end.phase, end.step) == (pb.PHASE_SUCCEEDED, STEPS)
        assert end.image


async def test_the_last_reader_who_leaves_cancels(service: Service, engine: FakeEngine) -> None:
    """CANCEL: the first of two readers may leave, the second may not."""
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


async def test_a_reader_who_comes_back_within_the_grace_saves_it(service: Service, engine: FakeEngine) -> None:
    """With a grace the generation waits for somebody to come back, and goes on for them."""
    call = service.stub.Generate(request(disconnect_grace=Duration(seconds=600)))
    engine.allow(1)
    generation_id = (await read_to_step(call, 1)).generation_id
    call.cancel()
    await wait_for_readers(service, generation_id, 0)
    watcher = service.stub.Watch(pb.WatchRequest(generation_id=generation_id))
    engine.allow()
    assert (await finished(watcher)).phase == pb.PHASE_SUCCEEDED
    assert not engine.stops[0].is_set()


async def test_a_grace_that_passes_cancels(service: Service, engine: FakeEngine) -> None:
    """Nobody comes back: the run is stopped."""
    call = service.stub.Generate(request(disconnect_grace=Duration(nanos=1_000_000)))
    await read_until(call, pb.PHASE_DENOISING)
    call.cancel()
    assert await asyncio.to_thread(engine.stops[0].wait, 20)


async def test_the_request_of_an_abandoned_generation_begins_anew(service: Service, engine: FakeEngine) -> None:
    """Nobody waited for that picture any more: the same request id makes it, under another id."""
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
    # The older one has ended later, and must not take the request id back.
    once_more = await read_until(service.stub.Generate(request(request_id="mine")), pb.PHASE_SUCCEEDED)
    assert once_more.generation_id != first.generation_id


async def test_the_request_of_a_cancelled_generation_stays_cancelled(service: Service, engine: FakeEngine) -> None:
    """What its caller did not want is not begun again by the same request id."""
    call = service.stub.Generate(request(request_id="mine"))
    first = await read_until(call, pb.PHASE_DENOISING)
    await service.stub.Cancel(pb.CancelRequest(generation_id=first.generation_id))
    again = service.stub.Generate(request(request_id="mine"))
    engine.allow()
    end = await read_until(again, pb.PHASE_CANCELLED)
    assert (end.generation_id, end.error.reason) == (first.generation_id, "CANCELLED")


async def wait_for_readers(service: Service, generation_id: str, count: int) -> None:
    """Waits until the server has noticed who came or left."""
    async with asyncio.timeout(20):
        while service.generations.find(generation_id, Caller("")).readers != count:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)


async def test_finishing_ends_with_the_picture_as_it_is(service: Service, engine: FakeEngine) -> None:
    """After the step under way the estimate becomes the final image, and says of which step it is."""
    call = service.stub.Generate(request())
    engine.allow(1)
    generation_id = (await read_to_step(call, 1)).generation_id
    answer = await service.stub.Finish(pb.FinishRequest(generation_id=generation_id))
    assert answer.phase == pb.PHASE_DENOISING
    engine.allow(1)
    end = await finished(call)
    assert (end.phase, end.step, end.total_steps, end.finished_early) == (pb.PHASE_SUCCEEDED, 2, STEPS, True)
    assert end.image
    again = await service.stub.Finish(pb.FinishRequest(generation_id=generation_id))
    assert again.phase == pb.PHASE_SUCCEEDED


async def test_the_same_request_id_never_starts_twice(service: Service, engine: FakeEngine) -> None:
    """While it runs and after its end, the second call follows the first generation, whoever drew the seed."""
    named = pb.GenerateRequest(prompt="a red apple", step_count=STEPS, request_id="mine")
    first, second = service.stub.Generate(named), service.stub.Generate(named)
    engine.allow()
    ends = [*await asyncio.gather(finished(first), finished(second)), await finished(service.stub.Generate(named))]
    assert len({end.generation_id for end in ends}) == 1
    assert len({end.image for end in ends}) == 1
    assert len(engine.jobs) == 1


async def test_a_request_id_with_other_parameters_is_refused(service: Service, engine: FakeEngine) -> None:
    """ALREADY_EXISTS names what differs, and the first generation is not disturbed."""
    first = service.stub.Generate(request(request_id="mine"))
    await read_until(first, pb.PHASE_DENOISING)
    other = pb.GenerateRequest(prompt="a green apple", seed=8, step_count=STEPS, request_id="mine")
    with pytest.raises(grpc.aio.AioRpcError, match="a different prompt, seed") as caught:
        await finished(service.stub.Generate(other))
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    engine.allow()
    assert (await finished(first)).phase == pb.PHASE_SUCCEEDED


async def test_ones_own_generations_are_listed_newest_first_in_pages(service: Service, engine: FakeEngine) -> None:
    """What runs, waits and has ended, each once, across pages."""
    engine.allow()
    for seed in range(3):
        await finished(service.stub.Generate(pb.GenerateRequest(prompt=f"p{seed}", seed=seed, request_id=f"r{seed}")))
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
    """Nobody can guess ids, and what is forgotten is unknown."""
    kind = {"Watch": pb.WatchRequest, "Cancel": pb.CancelRequest, "Finish": pb.FinishRequest}[method]
    call = getattr(service.stub, method)(kind(generation_id="nobody"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (drain(call) if method == "Watch" else call)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_only_as_many_ends_are_kept_as_there_is_room_for() -> None:
    """The oldest is forgotten, and its request id can be used again."""
    engine = FakeEngine()
    async with running(engine, retained=1) as service:
        old, new = [
            await finished(service.stub.Generate(pb.GenerateRequest(prompt="a", seed=seed, request_id=f"r{seed}")))
            for seed in range(2)
        ]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await finished(service.stub.Watch(pb.WatchRequest(generation_id=old.generation_id)))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        kept = await finished(service.stub.Watch(pb.WatchRequest(generation_id=new.generation_id)))
        assert kept.image == new.image
        again = await finished(service.stub.Generate(pb.GenerateRequest(prompt="b", request_id="r0")))
        assert again.generation_id != old.generation_id


async def test_two_watchers_get_previews_of_their_own_size_and_rate(service: Service, engine: FakeEngine) -> None:
    """One asks for none, one for every second; the generation's own reader is not affected."""
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
