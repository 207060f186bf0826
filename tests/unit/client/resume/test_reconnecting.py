"""Lost connections and lost servers, over real sockets, with both clients."""

import asyncio
import threading
from typing import Any

import grpc
import pytest

from calotype import AsyncClient, Cancelled, Client, DeadlineExceeded, NotFound, Phase, Unavailable
from calotype.testing import FakeServer
from calotype.v1 import calotype_pb2 as v1
from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer

HOURS = 7200.0


def check_uninterrupted(seen, steps):
    """Checks that a stream shows no sign of reconnections."""
    assert [progress.image_step for progress in seen if progress.preview] == list(range(1, steps + 1))
    sequences = [progress.sequence for progress in seen]
    assert sequences == sorted(set(sequences))
    assert [progress.step for progress in seen] == sorted(progress.step for progress in seen)
    assert [progress.phase.ended for progress in seen] == [False] * (len(seen) - 1) + [True]


@pytest.mark.proves("python", "resumes")
@pytest.mark.proves("python-async", "resumes")
@pytest.mark.parametrize(
    "faults", [{"drop_at": [0, 2, 3]}, {"lose_at": [2]}, {"drop_at": [1, 4], "lose_at": [3]}], ids=str
)
async def test_loop_survives_lost_connections(without_waits, faults):
    """Dropped connections and lost generations do not show in the loop, and the image is the same."""
    with FakeServer(steps=4, chunk_bytes=300, **faults) as server, without_waits(Client(server.address)) as client:
        generation = client.generate("a red apple")
        check_uninterrupted(list(generation), 4)
        assert generation.result().to_pil().size == (64, 64)
    assert len({request.request_id for request in server.requests}) == 1
    assert [request.seed for request in server.requests[1:]] == [1234] * len(faults.get("lose_at", []))
    assert server.cancelled == []
    with FakeServer(steps=4, chunk_bytes=300, **faults) as server:
        async with without_waits(AsyncClient(server.address)) as client:
            generation = client.generate("a red apple")
            check_uninterrupted([progress async for progress in generation], 4)
            assert (await generation.result()).to_pil().size == (64, 64)
    assert server.cancelled == []


async def test_loop_survives_a_server_restart(without_waits):
    """The loop survives a server that stops, stays away for a while and restarts without its generations."""

    def policy(server):
        attempts = iter(range(10**6))

        def come_back():
            if next(attempts) == 2:
                server.restart()
            return 0.0

        return {"random": come_back, "retries": 10**6}

    with FakeServer(steps=4, hold_at=2) as server, without_waits(Client(server.address), **policy(server)) as client:
        generation, seen = client.generate("a red apple", seed=5), []
        for progress in generation:
            seen.append(progress)
            if progress.step == 2:
                server.stop()
        check_uninterrupted(seen, 4)
        assert [request.seed for request in server.requests] == [5, 5]
        assert [generation.id, seen[0].generation_id] == ["fake-2", "fake-1"]
    with FakeServer(steps=4, hold_at=2) as server:
        async with without_waits(AsyncClient(server.address), **policy(server)) as client:
            seen = []
            async for progress in client.generate("a red apple", seed=5):
                seen.append(progress)
                if progress.step == 2:
                    server.stop()
            check_uninterrupted(seen, 4)


class LosesFirst(GenerationServiceServicer):
    """Breaks the first call before its first message."""

    def __init__(self):
        self.requests = []

    def Generate(self, request, context):  # noqa: N802
        """Breaks the call, or succeeds."""
        self.requests.append(request)
        if len(self.requests) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield v1.Progress(generation_id="g", sequence=1, phase=v1.PHASE_SUCCEEDED, image=b"image", chunk_count=1)


async def test_lost_first_message_starts_no_second_generation(serve, without_waits):
    """After a lost first message, the client sends the same request with the same id."""
    with serve(servicer := LosesFirst()) as address, without_waits(Client(address)) as client:
        assert client.generate("a red apple").result().data == b"image"
        first, second = servicer.requests
        assert first == second
        assert first.request_id
    with serve(servicer := LosesFirst()) as address:
        async with without_waits(AsyncClient(address)) as client:
            assert (await client.generate("a red apple", request_id="mine").result()).data == b"image"
            assert [request.request_id for request in servicer.requests] == ["mine", "mine"]


class EndingServicer(GenerationServiceServicer):
    """Ends the first generation by draining and the second as abandoned, and completes the third."""

    def __init__(self):
        self.requests = []

    def Generate(self, request, context):  # noqa: N802
        """Sends a step, then the end."""
        self.requests.append(request)
        number = len(self.requests)
        facts: dict[str, Any] = {"generation_id": f"g{number}", "seed": 42}
        yield v1.Progress(**facts, sequence=1, phase=v1.PHASE_DENOISING, step=number)
        if number == 1:
            error = v1.Error(code=14, reason="DRAINING")
            yield v1.Progress(**facts, sequence=2, phase=v1.PHASE_FAILED, error=error)
            context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        if number == 2:
            # Some proxies drop the status.
            error = v1.Error(code=1, reason="ABANDONED")
            yield v1.Progress(**facts, sequence=2, phase=v1.PHASE_CANCELLED, error=error)
            return
        yield v1.Progress(**facts, sequence=2, phase=v1.PHASE_SUCCEEDED, image=b"image", chunk_count=1)


async def test_ends_that_the_server_caused_are_not_shown(serve, without_waits):
    """Ends that the server caused are not shown: the loop continues with the same image, and on_reconnect is called."""
    losses = []

    def note(error, delay):
        losses.append((error.reason, delay))

    with (
        serve(servicer := EndingServicer()) as address,
        without_waits(Client(address, on_reconnect=note)) as client,
    ):
        seen = list(client.generate("a red apple"))
    assert [progress.step for progress in seen] == [1, 2, 3, 3]
    assert [progress.phase.ended for progress in seen] == [False, False, False, True]
    assert [request.seed for request in servicer.requests] == [0, 42, 42]
    assert len({request.request_id for request in servicer.requests}) == 1
    assert losses == [("DRAINING", 0.0), ("ABANDONED", 0.0)]
    with serve(servicer := EndingServicer()) as address:
        async with without_waits(AsyncClient(address)) as client:
            assert [progress.step async for progress in client.generate("a red apple")] == [1, 2, 3, 3]
    with serve(EndingServicer()) as address, Client(address, retries=0) as client, pytest.raises(Unavailable):
        client.generate("a red apple").result()


async def test_gives_up_after_the_last_attempt(without_waits):
    """When the server stays away, Unavailable is raised after the last attempt."""
    with FakeServer(hold_at=2) as server, without_waits(Client(server.address), retries=3) as client:
        generation = client.generate("a red apple")
        with pytest.raises(Unavailable):
            for progress in generation:
                if progress.step == 2:
                    server.stop()
        assert (generation.done, generation.progress.step) == (True, 2)
    with FakeServer(hold_at=2) as server:
        async with without_waits(AsyncClient(server.address), retries=3) as client:
            with pytest.raises(Unavailable):
                async for progress in client.generate("a red apple"):
                    if progress.step == 2:
                        server.stop()


async def test_deadline_ends_the_wait(without_waits):
    """The timeout ends a long wait, and its error names the reason of the wait."""
    patient = {"random": lambda: 1.0, "base": HOURS, "cap": HOURS}
    with (
        FakeServer(hold_at=2) as server,
        without_waits(Client(server.address), **patient) as client,
        pytest.raises(DeadlineExceeded, match="while reconnecting: "),
    ):
        for progress in client.generate("a red apple", timeout=1.0):
            if progress.step == 2:
                server.stop()
    with FakeServer(hold_at=2) as server:
        async with without_waits(AsyncClient(server.address), **patient) as client:
            with pytest.raises(DeadlineExceeded, match="while reconnecting: "):
                async for progress in client.generate("a red apple", timeout=1.0):
                    if progress.step == 2:
                        server.stop()


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_cancel_and_close_end_the_wait(without_waits, way):
    """cancel() and close() wake a thread that waits for the next attempt, with Cancelled."""
    waiting = threading.Event()

    def begin_to_wait():
        waiting.set()
        return 1.0

    with FakeServer(hold_at=2) as server:
        client = without_waits(Client(server.address), random=begin_to_wait, base=HOURS, cap=HOURS)
        generation, raised = client.generate("a red apple"), []

        def follow():
            try:
                for progress in generation:
                    if progress.step == 2:
                        server.drop()
            except Cancelled as error:
                raised.append(error)

        thread = threading.Thread(target=follow)
        thread.start()
        assert waiting.wait(10)
        generation.cancel() if way == "cancel" else client.close()
        thread.join()
        assert len(raised) == 1
        assert server.wait_cancelled()
        client.close()


@pytest.mark.parametrize("way", ["cancel", "aclose", "task"])
async def test_cancel_and_close_end_the_wait_of_a_task(without_waits, way):
    """cancel() and aclose() wake a task that waits for the next attempt, and cancel on the server."""
    waiting = asyncio.Event()

    def begin_to_wait():
        waiting.set()
        return 1.0

    with FakeServer(hold_at=2) as server:
        async with without_waits(AsyncClient(server.address), random=begin_to_wait, base=HOURS, cap=HOURS) as client:
            generation = client.generate("a red apple")

            async def follow():
                async for progress in generation:
                    if progress.step == 2:
                        server.drop()

            task = asyncio.create_task(follow())
            await waiting.wait()
            if way == "cancel":
                generation.cancel()
            elif way == "aclose":
                await client.aclose()
            else:
                task.cancel()
            with pytest.raises(asyncio.CancelledError if way == "task" else Cancelled):
                await task
            assert await asyncio.to_thread(server.wait_cancelled)


async def test_watch_resumes_but_starts_no_generation(without_waits):
    """watch() resumes after a lost connection; a lost generation raises NotFound."""
    with FakeServer(steps=3, hold_at=1) as server, without_waits(Client(server.address)) as client:
        held = iter(client.generate("a red apple"))
        while (progress := next(held)).step < 1:
            pass
        watched, seen = client.watch(progress.generation_id), []
        for progress in watched:
            seen.append(progress)
            if len(seen) == 1:
                server.drop()
                server.release()
        assert [progress.image_step for progress in seen if progress.preview] == [1, 2, 3]
        assert seen[-1].phase is Phase.SUCCEEDED
        assert [request.after_sequence for request in server.watched] == [0, seen[0].sequence]
        server.forget(progress.generation_id)
        with pytest.raises(NotFound):
            client.watch(progress.generation_id).result()
    assert len(server.requests) == 1


async def test_result_resumes(without_waits):
    """Waiting for the result survives lost connections, too."""
    with FakeServer(steps=4, drop_at=[1], lose_at=[3]) as server, without_waits(Client(server.address)) as client:
        assert client.generate("a red apple").result().format == "png"
    with FakeServer(steps=4, drop_at=[1], lose_at=[3]) as server:
        async with without_waits(AsyncClient(server.address)) as client:
            assert (await client.generate("a red apple").result()).format == "png"


async def test_first_contact_fails_immediately():
    """If no server can be reached at first, the error is raised without waiting."""
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        client.watch("x").result()
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.watch("x").result()


def test_retries_are_checked():
    """An invalid number of retries is rejected when the client is made."""
    for retries in (-1, 1.5, True):
        with pytest.raises(ValueError, match="retries"):
            Client(retries=retries)  # type: ignore[arg-type]
