"""Following a generation with the async client."""

import asyncio

import pytest

from calotype import (
    AsyncClient,
    Cancelled,
    ClientClosed,
    GenerationConsumed,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Phase,
)
from calotype.testing import FakeServer


@pytest.fixture
def held():
    """A server that holds generations at step 2."""
    with FakeServer(hold_at=2) as server:
        yield server


async def cancelled(server):
    """Waits for a cancellation without blocking the event loop."""
    return await asyncio.to_thread(server.wait_cancelled)


@pytest.mark.proves("python-async", "streams")
async def test_loop_and_result():
    """The loop ends after success, and result() returns the same image every time."""
    with FakeServer(chunk_bytes=500) as server:
        async with AsyncClient(server.address) as client:
            generation = client.generate("a red apple", seed=5)
            seen = [progress async for progress in generation]
            image = await generation.result()
            assert [progress.phase for progress in seen].count(Phase.SUCCEEDED) == 1
            assert await generation.result() is image
            assert (image.width, generation.seed, generation.done) == (64, 5, True)
            assert (await client.model()).name == "fake"
        assert server.cancelled == []


async def test_client_can_be_made_before_the_event_loop_runs():
    """A client made outside the event loop works: its channel belongs to the loop of the first call."""
    with FakeServer() as server:
        client = await asyncio.to_thread(AsyncClient, server.address)
        assert await client.generate("a red apple").result()
        await client.aclose()


@pytest.mark.proves("python-async", "cancels")
async def test_break_cancels_on_the_server(held):
    """Leaving the loop early cancels when the event loop next runs."""
    async with AsyncClient(held.address) as client:
        generation = client.generate("a red apple")
        async for progress in generation:
            if progress.step == 2:
                break
        assert await cancelled(held)
        with pytest.raises(Cancelled):
            await generation.result()


async def test_leaving_a_with_block_cancels_on_the_server(held):
    """Leaving an async with block cancels immediately, even while another reference to the iterator exists."""
    async with AsyncClient(held.address) as client:
        async with client.generate("a red apple") as generation:
            iterator = aiter(generation)
            while (await anext(iterator)).step < 2:
                pass
        assert generation.done
        assert await cancelled(held)
        with pytest.raises(Cancelled):
            await anext(iterator)


@pytest.mark.proves("python-async", "cancels")
async def test_cancelling_the_task_cancels_on_the_server(held):
    """Cancelling a task that follows a generation cancels both; the task ends with CancelledError."""
    async with AsyncClient(held.address) as client:
        generation, arrived = client.generate("a red apple"), asyncio.Event()

        async def follow():
            async for progress in generation:
                if progress.step == 2:
                    arrived.set()

        task = asyncio.create_task(follow())
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cancelled(held)


async def test_cancelling_a_wait_for_the_result_cancels_on_the_server(held):
    """Cancelling a wait for result() cancels the generation."""
    async with AsyncClient(held.address) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.generate("a red apple").result(), 2)
        assert await cancelled(held)


async def test_cancel_wakes_a_waiting_task(held):
    """cancel() ends another task's wait with Cancelled, not with asyncio.CancelledError."""
    async with AsyncClient(held.address) as client:
        generation = client.generate("a red apple")
        task = asyncio.create_task(generation.result())
        await asyncio.sleep(0)
        generation.cancel()
        with pytest.raises(Cancelled):
            await task


async def test_cancel_by_id_raises_cancelled_in_the_loop(held):
    """A generation cancelled by id raises Cancelled in its loop, not asyncio.CancelledError."""
    async with AsyncClient(held.address) as client:

        async def follow():
            async for progress in client.generate("a red apple"):
                if progress.step == 2:
                    assert await client.cancel(progress.generation_id) is Phase.DENOISING

        with pytest.raises(Cancelled) as caught:
            await follow()
        assert caught.value.reason == "CANCELLED"
        with pytest.raises(NotFound):
            await client.cancel("no such id")


async def test_rejection_with_cancelled_keeps_its_details():
    """A call that the server ends with CANCELLED before any message raises Cancelled with its reason."""
    with FakeServer(error=Cancelled("no", reason="DRAINING", retry_after=3)) as server:
        async with AsyncClient(server.address) as client:
            with pytest.raises(Cancelled) as caught:
                await client.generate("a red apple").result()
    assert (caught.value.reason, caught.value.retry_after) == ("DRAINING", 3)


@pytest.mark.parametrize("fail_at", [None, 1])
async def test_errors_are_typed(fail_at):
    """A rejected generation and one that fails later raise the same exception."""
    with FakeServer(error=Overloaded("full", reason="QUEUE_FULL", retry_after=2), fail_at=fail_at) as server:
        async with AsyncClient(server.address) as client:
            generation = client.generate("a red apple")
            for _ in range(2):
                with pytest.raises(Overloaded) as caught:
                    await generation.result()
                assert (caught.value.reason, caught.value.retry_after) == ("QUEUE_FULL", 2)


@pytest.mark.proves("python-async", "errors")
async def test_invalid_request_lists_every_violation():
    """InvalidRequest lists every violation by the name of its argument."""
    violations = [("width_px", "is 7"), ("step_count", "is 0")]
    with FakeServer(error=InvalidRequest("Two.", violations=violations)) as server:
        async with AsyncClient(server.address) as client:
            with pytest.raises(InvalidRequest) as caught:
                await client.generate("a red apple", width=7, steps=0).result()
    assert caught.value.violations == (("width", "is 7"), ("steps", "is 0"))


async def test_iterating_twice_raises():
    """A second loop over a generation raises GenerationConsumed."""
    with FakeServer() as server:
        async with AsyncClient(server.address) as client:
            generation = client.generate("a red apple")
            assert [progress async for progress in generation]
            with pytest.raises(GenerationConsumed):
                await anext(aiter(generation))


async def test_closed_client_raises():
    """Every use of a closed client raises ClientClosed; closing it again does not."""
    client = AsyncClient()
    await client.aclose()
    await client.aclose()
    with pytest.raises(ClientClosed):
        client.generate("a red apple")
    for use in (client.model, client.__aenter__, lambda: client.cancel("x")):
        with pytest.raises(ClientClosed):
            await use()


async def test_closing_the_client_cancels_its_generations(held):
    """A running generation of a closed client ends with Cancelled."""
    client = AsyncClient(held.address)

    async def follow():
        async for progress in client.generate("a red apple"):
            if progress.step == 2:
                await client.aclose()

    with pytest.raises(Cancelled):
        await follow()
    assert await cancelled(held)


async def test_invalid_argument_raises_immediately():
    """An argument that a request cannot carry raises before anything is sent."""
    async with AsyncClient() as client:
        with pytest.raises(InvalidRequest):
            client.generate("a red apple", steps="four")  # type: ignore[arg-type]


async def test_concurrent_generations():
    """One client follows several generations at the same time."""
    with FakeServer(error=None) as server:
        async with AsyncClient(server.address) as client:
            images = await asyncio.gather(*(client.generate("a red apple", seed=n).result() for n in range(8)))
    assert len(images) == 8
    assert sorted(request.seed for request in server.requests) == list(range(8))


async def test_failure_after_progress_leaves_the_progress():
    """The last progress remains available after an error."""
    with FakeServer(error=InternalError("no"), fail_at=2) as server:
        async with AsyncClient(server.address) as client:
            generation = client.generate("a red apple")
            with pytest.raises(InternalError):
                await generation.result()
            assert (generation.progress.phase, generation.progress.step) == (Phase.FAILED, 2)
