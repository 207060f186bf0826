"""Watching, finishing, listing, keeping and leaving, in both clients."""

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
    """A server whose generations stand still at step 2."""
    with FakeServer(hold_at=2) as server:
        yield server


def until_step_2(generation):
    """Iterates to where the server holds, and leaves."""
    for progress in generation:
        if progress.step == 2:
            return progress.generation_id
    raise AssertionError("It has no step 2.")


async def auntil_step_2(generation):
    """Does what `until_step_2` does."""
    async with generation:
        async for progress in generation:
            if progress.step == 2:
                return progress.generation_id
    raise AssertionError("It has no step 2.")


async def test_kept_generation_is_there_for_those_who_watch(held):
    """Leaving the loop of a kept generation ends nothing, and any client gets its picture."""
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


def test_watch_begins_with_the_newest_preview_and_goes_on(held):
    """A second reader sees what is there and what comes; what it knows already is not told again."""
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


async def test_leaving_a_watched_generation_leaves_it_alone(held):
    """Only cancel() of one who watches cancels."""
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
    """By the generation or by its id, the image comes early, and says so; afterwards there is nothing to finish."""
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


async def test_finish_of_a_refused_generation_says_why():
    """What never began cannot be finished."""
    with FakeServer(error=Overloaded("full")) as server, Client(server.address) as client:
        with pytest.raises(Overloaded):
            client.generate("a red apple").finish()
        async with AsyncClient(server.address) as other:
            with pytest.raises(Overloaded):
                await other.generate("a red apple").finish()


async def test_list_goes_through_all_pages():
    """Newest first, one page after the other, each when it is needed."""
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
    """A second call with the id finds the first, also after its end; other parameters are refused."""
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
    """What was chosen is sent; the rest only when the client is to resume."""
    with FakeServer() as server, Client(server.address, retries=retries) as client:
        client.generate("x", on_disconnect="cancel", disconnect_grace=2.5, request_id="mine").result()
        client.generate("x").result()
    chosen, default = server.requests
    assert (chosen.on_disconnect, chosen.request_id) == (v1.DISCONNECT_POLICY_CANCEL, "mine")
    assert chosen.disconnect_grace.ToMilliseconds() == 2500
    assert (bool(default.request_id), default.HasField("disconnect_grace")) == (retries > 0, retries > 0)


async def test_bad_arguments_are_named_before_anything_is_sent():
    """Watching and listing check what the wire cannot carry."""
    for client in (Client(), AsyncClient()):
        with pytest.raises(InvalidRequest) as caught:
            client.watch(None, after_sequence="one", previews=Previews(max_edge="big"))
        assert {field for field, _ in caught.value.violations} == {
            "generation_id",
            "after_sequence",
            "previews.max_edge",
        }
        with pytest.raises(InvalidRequest):
            client.generations(page_size="many")
        with pytest.raises(InvalidRequest):
            client.generate("x", on_disconnect="stay")
        await client.aclose() if isinstance(client, AsyncClient) else client.close()
        for use in (lambda client=client: client.watch("x"), client.generations):
            with pytest.raises(ClientClosed):
                use()
    with pytest.raises(ClientClosed):
        await client.finish("x")


async def test_closing_the_client_waits_for_what_it_has_to_say(held):
    """After close, the slots of what it ran are free already; what is kept goes on."""
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
    """A timeout is a way to leave: the server is told, whatever grace there is."""
    with Client(held.address) as client, pytest.raises(DeadlineExceeded):
        client.generate("a red apple", timeout=0.3, disconnect_grace=3600).result()
    assert held.wait_cancelled()


class Mute(GenerationServiceServicer):
    """Accepts a generation and says nothing."""

    def __init__(self):
        self.accepted, self.cancelled, self.request = threading.Event(), threading.Event(), None

    def Generate(self, request, context):  # noqa: N802
        """Waits until the caller has left."""
        left = threading.Event()
        context.add_callback(left.set)
        self.request = request
        self.accepted.set()
        left.wait()
        yield from ()

    def ListGenerations(self, request, context):  # noqa: N802
        """Knows that generation, and another."""
        mine = v1.GenerationSummary(generation_id="g", request_id=self.request.request_id)
        return v1.ListGenerationsResponse(generations=[v1.GenerationSummary(generation_id="other"), mine])

    def Cancel(self, request, context):  # noqa: N802
        """Notes the right one."""
        if request.generation_id == "g":
            self.cancelled.set()
        return v1.CancelResponse(phase=v1.PHASE_QUEUED)


async def test_leaving_before_the_first_message_cancels_as_well(serve):
    """The generation is found by its request id."""
    with serve(servicer := Mute()) as address, Client(address) as client:
        generation = client.generate("a red apple")
        assert servicer.accepted.wait(10)
        generation.cancel()
        assert servicer.cancelled.wait(10)
    with serve(servicer := Mute()) as address:
        async with AsyncClient(address) as client:
            generation = client.generate("a red apple")
            assert await asyncio.to_thread(servicer.accepted.wait, 10)
            generation.cancel()
            assert await asyncio.to_thread(servicer.cancelled.wait, 10)


async def test_farewell_that_fails_is_nobodys_problem(serve, scripted):
    """A server that cannot cancel by id, as an old one, changes nothing for the caller."""
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
