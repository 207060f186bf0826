"""Watching, finishing, listing, keeping and leaving generations, with both clients."""

import asyncio
import datetime
import threading

import grpc
import pytest

from calotype import (
    AlreadyExists,
    AsyncClient,
    CalotypeError,
    Cancelled,
    Client,
    ClientClosed,
    DeadlineExceeded,
    GenerationSummary,
    InvalidRequest,
    NotFound,
    Overloaded,
    Phase,
    Previews,
)
from calotype.testing import FakeServer
from calotype.v1 import calotype_pb2 as v1
from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer


@pytest.fixture
def held():
    """A server that holds generations at step 2."""
    with FakeServer(hold_at=2) as server:
        yield server


def until_step_2(generation):
    """Leaves the loop at the step where the server holds. Returns the id of the generation."""
    for progress in generation:
        if progress.step == 2:
            return progress.generation_id
    raise AssertionError("It has no step 2.")


async def auntil_step_2(generation):
    """Like `until_step_2`, for an AsyncGeneration."""
    async with generation:
        async for progress in generation:
            if progress.step == 2:
                return progress.generation_id
    raise AssertionError("It has no step 2.")


async def test_kept_generation_can_be_watched(held):
    """A kept generation continues after its loop is left, and any client can get its image."""
    with Client(held.address) as client:
        generation = client.generate("a red apple", on_disconnect="keep")
        generation_id = until_step_2(generation)
        with pytest.raises(Cancelled, match="has left"):
            generation.result()
        held.release()
    async with AsyncClient(held.address) as client:
        seen = [progress async for progress in client.watch(generation_id)]
        assert seen[-1].phase is Phase.SUCCEEDED
        assert (await client.watch(generation_id).result()).format == "png"
        kept = await auntil_step_2(client.generate("a pear", on_disconnect="keep"))
    with Client(held.address) as client:
        assert client.watch(kept).result().format == "png"
    assert held.cancelled == []


def test_watch_starts_with_the_newest_preview(held):
    """A second reader gets the newest preview and all later progress, without what it already knows."""
    with Client(held.address) as client, Client(held.address) as other:
        generation = client.generate("a red apple")
        follow = iter(generation)
        while (first := next(follow)).step < 2:
            pass
        watched = iter(other.watch(generation.id))
        assert next(watched).preview == first.preview
        held.release()
        assert [progress.step for progress in watched] == [3, 4, 4, 4]
        quiet = other.watch(generation.id, after_sequence=first.sequence, previews=Previews(method="none", max_edge=64))
        assert not any(progress.preview for progress in quiet)
        assert quiet.result() == generation.result()
    assert held.watched[-1] == v1.WatchRequest(
        generation_id=generation.id,
        after_sequence=first.sequence,
        preview=v1.PreviewOptions(method=v1.PREVIEW_METHOD_NONE, max_edge_px=64),
    )


async def test_leaving_a_watched_generation_does_not_cancel_it(held):
    """Leaving a watched generation does not affect it; only cancel() does."""
    with Client(held.address) as client, Client(held.address) as other:
        generation = client.generate("a red apple")
        follow = iter(generation)
        while next(follow).step < 2:
            pass
        until_step_2(other.watch(generation.id))
        async with AsyncClient(held.address) as third:
            await auntil_step_2(third.watch(generation.id))
        assert held.cancelled == []
        other.watch(generation.id).cancel()
        assert held.wait_cancelled()
        with pytest.raises(Cancelled):
            list(follow)


async def test_finish_makes_the_preview_the_image(held):
    """finish() yields the current estimate as the image; after the end it returns the end."""
    with Client(held.address) as client:
        generation, found = client.generate("a red apple"), []
        for progress in generation:
            if progress.step == 2 and not found:
                found.append(generation.finish())
        assert (progress.phase, progress.step, progress.finished_early) == (Phase.SUCCEEDED, 2, True)
        assert generation.result().format == "png"
        assert [*found, generation.finish(), client.finish(generation.id)] == ["denoising", "succeeded", "succeeded"]
        with pytest.raises(NotFound):
            client.finish("no such id")
    async with AsyncClient(held.address) as client:
        generation = client.generate("a red apple")
        assert not (await generation.finish()).ended
        assert (await generation.result()).format == "png"
        assert generation.progress.step in (1, 2)
        assert generation.progress.finished_early
        with pytest.raises(NotFound):
            await client.finish("no such id")


async def test_finish_of_a_rejected_generation_raises():
    """finish() of a rejected generation raises the server's error."""
    with FakeServer(error=Overloaded("full")) as server, Client(server.address) as client:
        with pytest.raises(Overloaded):
            client.generate("a red apple").finish()
        async with AsyncClient(server.address) as other:
            with pytest.raises(Overloaded):
                await other.generate("a red apple").finish()


async def test_list_reads_all_pages():
    """generations() lists all pages, newest first."""
    with FakeServer(steps=1) as server, Client(server.address) as client:
        for seed in range(5):
            client.generate("a red apple", seed=seed, request_id=f"r{seed}").result()
        listed = list(client.generations(page_size=2))
        assert [summary.seed for summary in listed] == [4, 3, 2, 1, 0]
        assert listed == list(client.generations())
        assert listed[-1] == GenerationSummary(
            generation_id="fake-1",
            request_id="r0",
            prompt="a red apple",
            phase=Phase.SUCCEEDED,
            step=1,
            total_steps=1,
            seed=0,
            create_time=datetime.datetime(2023, 11, 14, 22, 13, 21, tzinfo=datetime.UTC),
        )
        async with AsyncClient(server.address) as other:
            assert [summary async for summary in other.generations(page_size=3)] == listed


async def test_same_request_id_follows_the_same_generation():
    """A second call with the same request id follows the first generation; other arguments raise AlreadyExists."""
    with FakeServer() as server, Client(server.address) as client:
        first = client.generate("a red apple", request_id="mine")
        second = client.generate("a red apple", request_id="mine")
        assert first.result() == second.result()
        assert first.id == second.id
        with pytest.raises(AlreadyExists):
            client.generate("a pear", request_id="mine").result()
        async with AsyncClient(server.address) as other:
            with pytest.raises(AlreadyExists):
                await other.generate("a pear", request_id="mine").result()
    assert len({request.request_id for request in server.requests}) == 1


@pytest.mark.parametrize("retries", [0, 3])
def test_arguments_reach_the_server(retries):
    """Chosen arguments are sent; a client with retries adds a request id and a grace."""
    with FakeServer() as server, Client(server.address, retries=retries) as client:
        client.generate("x", on_disconnect="cancel", disconnect_grace=2.5, request_id="mine").result()
        client.generate("x").result()
    chosen, default = server.requests
    assert (chosen.on_disconnect, chosen.request_id) == (v1.DISCONNECT_POLICY_CANCEL, "mine")
    assert chosen.disconnect_grace.ToMilliseconds() == 2500
    assert (bool(default.request_id), default.HasField("disconnect_grace")) == (retries > 0, retries > 0)


async def test_invalid_arguments_raise_before_anything_is_sent():
    """watch() and generations() reject arguments that a request cannot carry, before sending anything."""
    sync_client, async_client = Client(), AsyncClient()
    for client in (sync_client, async_client):
        with pytest.raises(InvalidRequest) as caught:
            client.watch(None, after_sequence="one", previews=Previews(max_edge="big"))  # type: ignore[arg-type]
        assert {field for field, _ in caught.value.violations} == {
            "generation_id",
            "after_sequence",
            "previews.max_edge",
        }
        with pytest.raises(InvalidRequest):
            client.generations(page_size="many")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest):
            client.generate("x", on_disconnect="stay")  # type: ignore[arg-type]
        await client.aclose() if isinstance(client, AsyncClient) else client.close()
        for use in (lambda client=client: client.watch("x"), client.generations):
            with pytest.raises(ClientClosed):
                use()
    with pytest.raises(ClientClosed):
        sync_client.finish("x")
    with pytest.raises(ClientClosed):
        await async_client.finish("x")


async def test_closing_the_client_waits_for_cancels(held):
    """close() waits until its cancels have arrived; kept generations continue."""
    client = Client(held.address)
    generation, kept = client.generate("a red apple"), client.generate("a pear", on_disconnect="keep")
    iterators = [iter(generation), iter(kept)]
    for iterator in iterators:
        while next(iterator).step < 2:
            pass
    client.close()
    assert held.cancelled == [generation.id]
    other = AsyncClient(held.address)
    generation = other.generate("a red apple")
    iterator = aiter(generation)
    while (await anext(iterator)).step < 2:
        pass
    await other.aclose()
    assert held.cancelled[1:] == [generation.id]


async def test_deadline_frees_the_slot(held):
    """When the timeout passes, the client cancels on the server, regardless of the grace period."""
    with Client(held.address) as client, pytest.raises(DeadlineExceeded):
        client.generate("a red apple", timeout=0.3, disconnect_grace=3600).result()
    assert held.wait_cancelled()


class SilentServicer(GenerationServiceServicer):
    """Accepts a generation and sends nothing."""

    def __init__(self):
        self.accepted, self.cancelled, self.request = threading.Event(), threading.Event(), None

    def Generate(self, request, context):  # noqa: N802
        """Waits until the caller leaves."""
        left = threading.Event()
        context.add_callback(left.set)
        self.request = request
        self.accepted.set()
        left.wait()
        yield from ()

    def ListGenerations(self, request, context):  # noqa: N802
        """Lists that generation and another one."""
        mine = v1.GenerationSummary(generation_id="g", request_id=self.request.request_id)
        return v1.ListGenerationsResponse(generations=[v1.GenerationSummary(generation_id="other"), mine])

    def Cancel(self, request, context):  # noqa: N802
        """Records a cancel of that generation."""
        if request.generation_id == "g":
            self.cancelled.set()
        return v1.CancelResponse(phase=v1.PHASE_QUEUED)


async def test_leaving_before_the_first_message_cancels(serve):
    """A generation that is left before its first message is found by its request id and cancelled."""
    with serve(servicer := SilentServicer()) as address, Client(address) as client:
        generation = client.generate("a red apple")
        assert servicer.accepted.wait(10)
        generation.cancel()
        assert servicer.cancelled.wait(10)
    with serve(servicer := SilentServicer()) as address:
        async with AsyncClient(address) as client:
            generation = client.generate("a red apple")
            assert await asyncio.to_thread(servicer.accepted.wait, 10)
            generation.cancel()
            assert await asyncio.to_thread(servicer.cancelled.wait, 10)


async def test_failed_cancel_does_not_affect_the_caller(serve, scripted):
    """A server that fails to cancel by id does not affect the caller."""
    message = v1.Progress(generation_id="g", sequence=1, phase=v1.PHASE_DENOISING)
    with serve(scripted([message], end=lambda context: context.abort(grpc.StatusCode.INTERNAL, "broken"))) as address:
        with Client(address) as client:
            for _ in client.generate("a red apple"):
                break
        async with AsyncClient(address) as client:
            async for _ in client.generate("a red apple"):
                break
            with pytest.raises(CalotypeError):
                await client.generate("a red apple").result()
