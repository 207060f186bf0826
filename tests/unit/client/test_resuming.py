"""Lost connections and lost servers, over real sockets, in both clients."""

import asyncio
import threading

import grpc
import pytest

from calotype import AsyncClient, Cancelled, Client, DeadlineExceeded, NotFound, Phase, Unavailable
from calotype.testing import FakeServer
from calotype.v1 import calotype_pb2 as v1
from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer

HOURS = 7200.0


def check_uninterrupted(seen, steps):
    """A stream without a trace of what happened to its connection."""
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
async def test_loop_goes_on(at_once, faults):
    """Dropped connections and lost generations are not seen by the loop, and the picture is the same."""
    with FakeServer(steps=4, chunk_bytes=300, **faults) as server, at_once(Client(server.address)) as client:
        generation = client.generate("a red apple")
        check_uninterrupted(list(generation), 4)
        assert generation.result().to_pil().size == (64, 64)
    assert len({request.request_id for request in server.requests}) == 1
    assert [request.seed for request in server.requests[1:]] == [1234] * len(faults.get("lose_at", []))
    assert server.cancelled == []
    with FakeServer(steps=4, chunk_bytes=300, **faults) as server:
        async with at_once(AsyncClient(server.address)) as client:
            generation = client.generate("a red apple")
            check_uninterrupted([progress async for progress in generation], 4)
            assert (await generation.result()).to_pil().size == (64, 64)
    assert server.cancelled == []


async def test_server_is_started_anew(at_once):
    """A server that is gone, refuses connections for a while and knows nothing afterwards: the loop goes on."""

    def policy(server):
        attempts = iter(range(10**6))

        def come_back():
            if next(attempts) == 2:
                server.restart()
            return 0.0

        return {"random": come_back, "retries": 10**6}

    with FakeServer(steps=4, hold_at=2) as server, at_once(Client(server.address), **policy(server)) as client:
        generation, seen = client.generate("a red apple", seed=5), []
        for progress in generation:
            seen.append(progress)
            if progress.step == 2:
                server.stop()
        check_uninterrupted(seen, 4)
        assert [request.seed for request in server.requests] == [5, 5]
        assert [generation.id, seen[0].generation_id] == ["fake-2", "fake-1"]
    with FakeServer(steps=4, hold_at=2) as server:
        async with at_once(AsyncClient(server.address), **policy(server)) as client:
            seen = []
            async for progress in client.generate("a red apple", seed=5):
                seen.append(progress)
                if progress.step == 2:
                    server.stop()
            check_uninterrupted(seen, 4)


class LosesFirst(GenerationServiceServicer):
    """Breaks the first call before its first message, as a link does that breaks at a bad moment."""

    def __init__(self):
        self.requests = []

    def Generate(self, request, context):  # noqa: N802
        """Breaks, or succeeds."""
        self.requests.append(request)
        if len(self.requests) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield v1.Progress(generation_id="g", sequence=1, phase=v1.PHASE_SUCCEEDED, image=b"image", chunk_count=1)


async def test_lost_first_message_starts_nothing_twice(serve, at_once):
    """The same request goes out again, with the same id by which the server knows it."""
    with serve(servicer := LosesFirst()) as address, at_once(Client(address)) as client:
        assert client.generate("a red apple").result().data == b"image"
        first, second = servicer.requests
        assert first == second
        assert first.request_id
    with serve(servicer := LosesFirst()) as address:
        async with at_once(AsyncClient(address)) as client:
            assert (await client.generate("a red apple", request_id="mine").result()).data == b"image"
            assert [request.request_id for request in servicer.requests] == ["mine", "mine"]


class EndsForItsOwnReasons(GenerationServiceServicer):
    """Ends the first generation because it stops, the second because nobody seemed to read, and makes the third."""

    def __init__(self):
        self.requests = []

    def Generate(self, request, context):  # noqa: N802
        """Shows a step, and ends."""
        self.requests.append(request)
        number = len(self.requests)
        facts = {"generation_id": f"g{number}", "seed": 42}
        yield v1.Progress(**facts, sequence=1, phase=v1.PHASE_DENOISING, step=number)
        if number == 1:
            error = v1.Error(code=14, reason="DRAINING")
            yield v1.Progress(**facts, sequence=2, phase=v1.PHASE_FAILED, error=error)
            context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        if number == 2:
            # The status is lost on the way, as some proxies do.
            error = v1.Error(code=1, reason="ABANDONED")
            yield v1.Progress(**facts, sequence=2, phase=v1.PHASE_CANCELLED, error=error)
            return
        yield v1.Progress(**facts, sequence=2, phase=v1.PHASE_SUCCEEDED, image=b"image", chunk_count=1)


async def test_ends_that_are_not_the_callers_doing_are_not_shown(serve, at_once):
    """The loop goes on with the same picture, drawn anew, and who asked is told of each attempt."""
    told = []

    def note(error, delay):
        told.append((error.reason, delay))

    with serve(servicer := EndsForItsOwnReasons()) as address, at_once(Client(address, on_reconnect=note)) as client:
        seen = list(client.generate("a red apple"))
    assert [progress.step for progress in seen] == [1, 2, 3, 3]
    assert [progress.phase.ended for progress in seen] == [False, False, False, True]
    assert [request.seed for request in servicer.requests] == [0, 42, 42]
    assert len({request.request_id for request in servicer.requests}) == 1
    assert told == [("DRAINING", 0.0), ("ABANDONED", 0.0)]
    with serve(servicer := EndsForItsOwnReasons()) as address:
        async with at_once(AsyncClient(address)) as client:
            assert [progress.step async for progress in client.generate("a red apple")] == [1, 2, 3, 3]
    with serve(EndsForItsOwnReasons()) as address, Client(address, retries=0) as client, pytest.raises(Unavailable):
        client.generate("a red apple").result()


async def test_gives_up_when_nothing_comes_of_it(at_once):
    """A server that stays away is Unavailable after the attempts are used up."""
    with FakeServer(hold_at=2) as server, at_once(Client(server.address), retries=3) as client:
        generation = client.generate("a red apple")
        with pytest.raises(Unavailable):
            for progress in generation:
                if progress.step == 2:
                    server.stop()
        assert (generation.done, generation.progress.step) == (True, 2)
    with FakeServer(hold_at=2) as server:
        async with at_once(AsyncClient(server.address), retries=3) as client:
            with pytest.raises(Unavailable):
                async for progress in client.generate("a red apple"):
                    if progress.step == 2:
                        server.stop()


async def test_deadline_ends_the_wait(at_once):
    """However long the wait would be, the timeout holds, and the error says what was waited for."""
    patient = {"random": lambda: 1.0, "base": HOURS, "cap": HOURS}
    with (
        FakeServer(hold_at=2) as server,
        at_once(Client(server.address), **patient) as client,
        pytest.raises(DeadlineExceeded, match="while reconnecting: "),
    ):
        for progress in client.generate("a red apple", timeout=1.0):
            if progress.step == 2:
                server.stop()
    with FakeServer(hold_at=2) as server:
        async with at_once(AsyncClient(server.address), **patient) as client:
            with pytest.raises(DeadlineExceeded, match="while reconnecting: "):
                async for progress in client.generate("a red apple", timeout=1.0):
                    if progress.step == 2:
                        server.stop()


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_cancel_and_close_end_the_wait(at_once, way):
    """A thread that waits for the next attempt is woken, with Cancelled."""
    waiting = threading.Event()

    def begin_to_wait():
        waiting.set()
        return 1.0

    with FakeServer(hold_at=2) as server:
        client = at_once(Client(server.address), random=begin_to_wait, base=HOURS, cap=HOURS)
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
async def test_cancel_and_close_end_the_wait_of_a_task(at_once, way):
    """A task that waits for the next attempt is woken as well, and the generation is cancelled on the server."""
    waiting = asyncio.Event()

    def begin_to_wait():
        waiting.set()
        return 1.0

    with FakeServer(hold_at=2) as server:
        async with at_once(AsyncClient(server.address), random=begin_to_wait, base=HOURS, cap=HOURS) as client:
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


async def test_watch_resumes_but_makes_nothing_anew(at_once):
    """Who watches comes back after a drop; a generation that is gone is NotFound."""
    with FakeServer(steps=3, hold_at=1) as server, at_once(Client(server.address)) as client:
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


async def test_result_resumes_as_well(at_once):
    """Waiting for the result alone survives the same."""
    with FakeServer(steps=4, drop_at=[1], lose_at=[3]) as server, at_once(Client(server.address)) as client:
        assert client.generate("a red apple").result().format == "png"
    with FakeServer(steps=4, drop_at=[1], lose_at=[3]) as server:
        async with at_once(AsyncClient(server.address)) as client:
            assert (await client.generate("a red apple").result()).format == "png"


async def test_first_contact_fails_at_once():
    """Nobody there is told without any wait, with the usual policy."""
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        client.watch("x").result()
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.watch("x").result()


def test_retries_are_checked():
    """A number that makes no sense is refused when the client is made."""
    for retries in (-1, 1.5, True):
        with pytest.raises(ValueError, match="retries"):
            Client(retries=retries)
