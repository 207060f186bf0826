"""What is known of generations, and for how long: while it is being written, after its end, across a restart."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from calotype_server import errors
from calotype_server.auth.access import Caller
from calotype_server.generations.admission import Admission
from calotype_server.generations.estimates import StepTimeEstimator
from calotype_server.generations.lifecycle import Generations
from calotype_server.generations.retention import Retention
from calotype_server.generations.store import Store
from calotype_server.images.encoder import Encoder
from calotype_server.types import DeliveryOptions, DisconnectPolicy, Job, Phase
from support.engine.fake_engine import FakeEngine

if TYPE_CHECKING:
    from pathlib import Path

JOB = Job("a cat", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")
NAMED = DeliveryOptions(request_id="mine")


class SlowStore(Store):
    """One whose disk writes a new generation when the test says so, or fails to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.writes = asyncio.Event()
        self.writing = asyncio.Event()
        self.full = False

    async def accept(self, record) -> None:
        """Waits, and then writes."""
        self.writing.set()
        await self.writes.wait()
        if self.full:
            raise errors.StateUnavailable("no room", retry_after=1)
        await super().accept(record)

    async def image(self, generation_id: str) -> bytes | None:
        """Fails like a disk with a bad sector, while it is `full`."""
        if self.full:
            raise errors.StateUnavailable("bad sector")
        return await super().image(generation_id)


@contextlib.asynccontextmanager
async def generations(engine: FakeEngine, store: Store | None = None, *, seconds: float = 600, max_queue: int = 3):
    """All generations of an engine, which are ended with the block."""
    pace, encoder = StepTimeEstimator(), Encoder()
    ended: Retention = Retention(seconds=seconds, count=9, size=2**20)
    admission = Admission(pace, max_active=1, max_queue=max_queue)
    made = Generations(engine, admission, pace, encoder, ended, store, max_active=1, on_dead=lambda: None)
    try:
        yield made
    finally:
        engine.close()
        await made.end_all()
        made.close()
        encoder.close()


async def first_of(made: Generations, generation):
    """The first thing that a reader is told."""
    async with contextlib.aclosing(made.follow(generation)) as updates:
        return (await anext(updates))[0]


async def to_end(made: Generations, generation) -> Phase:
    """Reads to the end, and returns which it was."""
    async for update, _ in made.follow(generation):
        phase = update.state.phase
    return phase


async def leave(reader: asyncio.Task) -> None:
    """As a caller whose connection drops."""
    reader.cancel()
    await asyncio.wait({reader})


class TestWhileItIsWritten:
    """Nobody is told of a generation before it is on disk, and whoever leaves meanwhile is one who leaves."""

    async def test_the_same_request_waits_too_and_is_not_harmed_by_the_first_who_leaves(self, tmp_path: Path) -> None:
        """A caller whose connection dropped comes back before the server has noticed."""
        store = await SlowStore.open(tmp_path)
        async with generations(FakeEngine(), store) as made:
            first = asyncio.create_task(to_end(made, await made.start(JOB, NAMED)))
            await store.writing.wait()
            second = asyncio.create_task(to_end(made, await made.start(JOB, NAMED)))
            told, _ = await asyncio.wait({first, second}, timeout=0.05)
            assert not told
            await leave(first)
            store.writes.set()
            assert await second is Phase.SUCCEEDED
            assert [each.generation_id for each in await store.load()] == [(await made.start(JOB, NAMED)).id]
        await store.close()

    async def test_what_is_to_be_kept_is_kept(self, tmp_path: Path) -> None:
        """KEEP: the caller has gone before the disk was done."""
        store = await SlowStore.open(tmp_path)
        async with generations(FakeEngine(), store) as made:
            generation = await made.start(JOB, DeliveryOptions(on_disconnect=DisconnectPolicy.KEEP))
            reader = asyncio.create_task(first_of(made, generation))
            await store.writing.wait()
            await leave(reader)
            store.writes.set()
            await made.idle()
            assert generation.log.state.phase is Phase.SUCCEEDED
        await store.close()

    async def test_what_nobody_waits_for_is_cancelled(self, tmp_path: Path) -> None:
        """CANCEL: the only caller has gone, and the same request begins anew."""
        store, engine = await SlowStore.open(tmp_path), FakeEngine()
        engine.hold()
        async with generations(engine, store) as made:
            generation = await made.start(JOB, NAMED)
            reader = asyncio.create_task(first_of(made, generation))
            await store.writing.wait()
            await leave(reader)
            store.writes.set()
            engine.allow()
            assert await to_end(made, await made.start(JOB, NAMED)) is Phase.SUCCEEDED
            assert generation.log.state.phase is Phase.CANCELLED
        await store.close()

    async def test_what_cannot_be_kept_is_given_up_and_can_be_asked_for_again(self, tmp_path: Path) -> None:
        """A full disk: UNAVAILABLE, and no work for nobody; once there is room, the same request is as good as new."""
        store, engine = await SlowStore.open(tmp_path), FakeEngine()
        engine.hold()
        store.writes.set()
        async with generations(engine, store) as made:
            store.full = True
            given_up = await made.start(JOB, NAMED)
            with pytest.raises(errors.StateUnavailable):
                await first_of(made, given_up)
            store.full = False
            engine.allow()
            again = await made.start(JOB, NAMED)
            assert again is not given_up
            assert await to_end(made, again) is Phase.SUCCEEDED
            assert given_up.ended
        await store.close()


async def test_what_has_ended_is_forgotten_in_time_though_nobody_asks(tmp_path: Path) -> None:
    """In memory and on disk: an idle server keeps no prompt and no picture longer than it says."""
    store = await Store.open(tmp_path)
    async with generations(FakeEngine(), store, seconds=0.05) as made:
        generation = await made.start(JOB, DeliveryOptions())
        assert await to_end(made, generation) is Phase.SUCCEEDED
        async with asyncio.timeout(20):
            while await store.load():  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
    await store.close()


class TestAfterARestart:
    """What the disk kept is there, as far as it can be."""

    async def test_what_finds_no_place_is_not_begun_by_a_later_start(self, tmp_path: Path) -> None:
        """Its caller has asked again by then, and must not get a second one."""
        store, engine = await Store.open(tmp_path), FakeEngine()
        engine.hold()
        async with generations(engine, store) as made:
            for _ in range(3):
                await first_of(made, await made.start(JOB, DeliveryOptions(on_disconnect=DisconnectPolicy.KEEP)))
        assert len(await store.load()) == 3
        engine = FakeEngine()
        engine.hold()
        async with generations(engine, store, max_queue=1) as made:
            await made.restore()
            assert len(made.newest(Caller(""))) == 2
        assert len(await store.load()) == 2
        await store.close()

    async def test_a_picture_that_cannot_be_read_is_no_reason_not_to_start(self, tmp_path: Path) -> None:
        """Its end says that it is lost; the others are there."""
        store = await SlowStore.open(tmp_path)
        store.writes.set()
        async with generations(FakeEngine(), store) as made:
            generation = await made.start(JOB, DeliveryOptions())
            assert await to_end(made, generation) is Phase.SUCCEEDED
        store.full = True
        async with generations(FakeEngine(), store) as made:
            await made.restore()
            assert await to_end(made, made.find(generation.id, Caller(""))) is Phase.FAILED
        await store.close()
