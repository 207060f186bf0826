"""Several generations of one prompt, with both clients."""

import asyncio
import dataclasses
import threading

import pytest

from calotype import (
    AsyncClient,
    Cancelled,
    Client,
    GenerationConsumed,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Phase,
)
from calotype._backends.aio.merging import merge as merge_async
from calotype._backends.threads.merging import merge
from calotype._testing.state import FakeState
from calotype.testing import _MODEL, FakeServer


@pytest.fixture
def held():
    """A server that holds generations at step 2."""
    with FakeServer(hold_at=2) as server:
        yield server


@pytest.fixture
def failing(monkeypatch):
    """Returns a function that lets the server reject the requests with these seeds."""

    def fail(error, *seeds):
        def generate(self, request):
            if request.seed in seeds:
                raise error
            return original(self, request)

        original = FakeState.generate
        monkeypatch.setattr(FakeState, "generate", generate)

    return fail


def calls_of(server, monkeypatch):
    """Returns a list to which every cancel of a generation or a group is added."""
    calls = []
    state = server._state
    for name in ("cancel", "cancel_group"):
        original = getattr(state, name)
        monkeypatch.setattr(state, name, lambda key, original=original: calls.append(key) or original(key))
    return calls


async def test_members_stream_together():
    """The async loop yields the progress of all members with their index, and `images` returns all of them."""
    with FakeServer(steps=3) as server:
        client = AsyncClient(server.address)
        async with client, client.generate_many("a red apple", 3, seed=5, steps=3) as group:
            seen = [(index, progress) async for index, progress in group]
            images = await group.images()
        assert server.cancelled == []
    assert len(images) == len(group) == 3
    for index in range(3):
        steps = [progress.step for member, progress in seen if member == index and progress.phase == "denoising"]
        assert steps == [0, 1, 2, 3]
    assert [generation.seed for generation in group.generations] == [5, 6, 7]
    assert {request.group for request in server.requests} == {group.id}
    assert group.done


def test_members_stream_together_without_asyncio():
    """The sync loop does the same, with a thread for each member, and the threads end."""
    with FakeServer(steps=3) as server, Client(server.address) as client:
        with client.generate_many("a red apple", 3, seed=5) as group:
            seen = [(each.member, each.progress.phase) for each in group]
            images = group.images()
        assert [index for index, phase in sorted(seen) if phase is Phase.SUCCEEDED] == [0, 1, 2]
        assert [image.width for image in images] == [64] * 3
        assert group.images() == images
        assert server.cancelled == []
    for thread in threading.enumerate():
        if thread.name.startswith("calotype-member"):
            thread.join(10)
            assert not thread.is_alive()


def test_requests_of_a_group():
    """Members differ in seed and request id; without a seed, or with -1, the server draws each of them."""
    with FakeServer() as server, Client(server.address) as client:
        client.generate_many("a", 2, seed=3, request_id="mine", width=32, loras={"pixel": 0.5}).images()
        client.generate_many("a", 2).images()
        client.generate_many("a", 2, seed=-1).images()
    named, unnamed, random = (server.requests[index : index + 2] for index in (0, 2, 4))
    assert sorted((each.seed, each.request_id, each.group) for each in named) == [
        (3, "mine/0", "mine"),
        (4, "mine/1", "mine"),
    ]
    assert all(each.width_px == 32 and each.loras[0].scale == 0.5 for each in named)
    assert not any(each.HasField("seed") for each in unnamed)
    assert len({each.request_id for each in unnamed}) == 2
    assert [each.seed for each in random] == [-1, -1]


def test_repeated_request_ids_follow_the_same_group():
    """A second call with the same request id starts nothing."""
    with FakeServer() as server, Client(server.address) as client:
        ids = [
            {generation.id for generation in group.generations}
            for group in (client.generate_many("a", 2, seed=1, request_id="mine") for _ in range(2))
            if group.images()
        ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("n", [0, 65, True, "4", 2.0])
def test_count_must_be_possible(n):
    """The number of members is checked together with the other arguments."""
    with Client() as client, pytest.raises(InvalidRequest) as caught:
        client.generate_many("a", n, width="wide")  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == ["n", "width"]


def test_unknown_arguments_are_type_errors():
    """An unknown argument raises TypeError, as in any function."""
    with Client() as client, pytest.raises(TypeError, match="argument 'tall'"):
        client.generate_many("a", 2, tall=32)  # type: ignore[call-arg]


async def test_one_failure_does_not_lose_the_others(failing):
    """The loop ends without an error; `images` raises that of the failed member, `outcomes` returns the others."""
    with FakeServer() as server:
        failing(Overloaded("full", reason="QUEUE_FULL"), 6)
        async with AsyncClient(server.address) as client, client.generate_many("a", 3, seed=5) as group:
            ends = [index async for index, progress in group if progress.phase is Phase.SUCCEEDED]
            outcomes = await group.outcomes()
            with pytest.raises(Overloaded):
                await group.images()
    assert sorted(ends) == [0, 2]
    assert [getattr(outcome, "reason", "") for outcome in outcomes] == ["", "QUEUE_FULL", ""]


def test_one_failure_does_not_lose_the_others_without_asyncio(failing):
    """The sync client does the same."""
    with FakeServer() as server, Client(server.address) as client:
        failing(InternalError("no", reason="NUMERICAL_FAILURE"), 5)
        group = client.generate_many("a", 2, seed=5)
        outcomes = group.outcomes()
        assert isinstance(outcomes[0], InternalError)
        assert not isinstance(outcomes[1], InternalError)
        with pytest.raises(InternalError):
            group.images()


async def test_leaving_the_block_cancels_the_group_with_one_call(held, monkeypatch):
    """Members that have not ended are cancelled, with a single call."""
    calls = calls_of(held, monkeypatch)
    async with AsyncClient(held.address) as client:
        async with client.generate_many("a", 4) as group:
            async for _, progress in group:
                if progress.step == 2:
                    break
        assert await asyncio.to_thread(held.wait_cancelled, count=len(held.requests))
        with pytest.raises(Cancelled):
            await group.images()
    assert calls == [group.id]


def test_leaving_the_block_cancels_the_group_without_asyncio(held, monkeypatch):
    """The sync client does the same."""
    calls = calls_of(held, monkeypatch)
    with Client(held.address) as client:
        with client.generate_many("a", 4) as group:
            for _, progress in group:
                if progress.step == 2:
                    break
        assert held.wait_cancelled(count=len(held.requests))
    assert calls == [group.id]


async def test_cancelling_the_task_cancels_the_group(held):
    """So does cancelling a task that waits for the images."""
    async with AsyncClient(held.address) as client:
        group = client.generate_many("a", 2)
        waiting = asyncio.create_task(group.images())
        while not all(each.id for each in group.generations):  # noqa: ASYNC110 - the fake server has no event for it
            await asyncio.sleep(0.01)
        waiting.cancel()
        assert await asyncio.to_thread(held.wait_cancelled, count=2)


async def test_a_kept_group_continues_until_it_is_cancelled(held):
    """With "keep", leaving the block leaves the members running; `cancel` ends them."""
    async with AsyncClient(held.address) as client:
        async with client.generate_many("a", 2, on_disconnect="keep") as group:
            async for _ in group:
                if all(each.id for each in group.generations):
                    break
        assert held.cancelled == []
        assert await client.cancel(group=group.id) == 2
        assert await client.cancel(group=group.id) == 0
        with pytest.raises(NotFound) as caught:
            await client.cancel(group="unknown")
        assert caught.value.reason == "GROUP_NOT_FOUND"
        again = client.generate_many("a", 2, on_disconnect="keep")
        again.cancel()
        with pytest.raises(Cancelled):
            await again.images()


@pytest.mark.parametrize("broken", [0, 1])
async def test_a_server_that_fails_does_not_keep_the_others_from_cancelling(broken, monkeypatch):
    """All servers get the cancel of a group; then the error of the one that failed is raised."""
    first, second = (dataclasses.replace(_MODEL, replica=tag) for tag in ("one", "two"))
    with FakeServer(model=first) as one, FakeServer(model=second) as other:
        servers = [one, other]

        def fail(group):
            raise InternalError("broken")

        monkeypatch.setattr(servers[broken]._state, "cancel_group", fail)
        calls = calls_of(servers[1 - broken], monkeypatch)
        async with AsyncClient(f"ipv4:{one.address},{other.address}") as client:
            with pytest.raises(InternalError):
                await client.cancel(group="cats")
        assert calls == ["cats"]


def test_cancel_takes_one_argument():
    """Neither an id nor a group, or both, is a TypeError."""
    with Client() as client:
        for arguments in ({}, {"generation_id": "a", "group": "b"}):
            with pytest.raises(TypeError):
                client.cancel(**arguments)


def test_closing_the_client_cancels_members(held):
    """Closing the client cancels the members that still run."""
    with Client(held.address) as client:
        group = client.generate_many("a", 2)
        for _ in group:
            if all(each.id for each in group.generations):
                break
    assert held.wait_cancelled(count=2)


async def test_members_reconnect_on_their_own(without_waits):
    """When connections are lost, each member continues where it was."""
    with FakeServer(steps=4, drop_at=[2]) as server:
        async with without_waits(AsyncClient(server.address)) as client:
            losses = []
            group = client.generate_many("a", 2, seed=1)
            group.on_reconnect(lambda error, _: losses.append(error))
            steps = [(index, progress.step) async for index, progress in group if progress.phase == "denoising"]
            assert len(await group.images()) == 2
    assert losses
    for index in (0, 1):
        mine = [step for member, step in steps if member == index]
        assert mine == sorted(mine)
        assert mine[-1] == 4


async def test_a_group_is_iterated_once():
    """The second loop raises, as for a generation, and cancels nothing."""
    with FakeServer() as server:
        async with AsyncClient(server.address) as client:
            group = client.generate_many("a", 2)
            assert [index async for index, _ in group]
            with pytest.raises(GenerationConsumed):
                async for _ in group:
                    pass
            assert "2 of 2 ended" in repr(group)


def test_merged_errors_reach_the_caller():
    """An exception of one source ends the merged loop; `leave` is called once."""
    left = []

    def broken():
        yield 1
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        for _ in merge([broken()], lambda: left.append(1)):
            pass
    assert left == [1]


async def test_merged_errors_reach_the_async_caller():
    """The asyncio version does the same, and cancels the other sources."""
    left, cancelled = [], []

    async def broken():
        yield 1
        raise KeyError("broken")

    async def waiting():
        try:
            await asyncio.Event().wait()
            yield 2
        finally:
            cancelled.append(1)

    with pytest.raises(KeyError, match="broken"):
        async for _ in merge_async([waiting(), broken()], lambda: left.append(1)):
            pass
    assert (left, cancelled) == ([1], [1])


def test_fake_server_rejects_late_members():
    """A member that arrives after the cancel of its group is rejected, as by a real server."""
    with FakeServer() as server, Client(server.address) as client:
        with pytest.raises(NotFound):
            client.cancel(group="cats")
        with pytest.raises(Cancelled) as caught:
            client.generate("a", group="cats").result()
        assert caught.value.reason == "GROUP_CANCELLED"
        assert next(iter(client.generations()), None) is None
        client.generate("a", group="dogs").result()
        assert next(iter(client.generations())).group == "dogs"
