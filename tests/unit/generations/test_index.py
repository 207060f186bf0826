"""Which generations can be found, and for how long: while they are written, after their end, after a restart."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from calotype_server import errors
from calotype_server.auth.access import Caller
from calotype_server.failpoints import injected
from calotype_server.generations.store import Store
from calotype_server.types import DeliveryOptions, DisconnectPolicy, Job, Phase
from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime

if TYPE_CHECKING:
    from pathlib import Path

JOB = Job("a cat", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")
NAMED = DeliveryOptions(request_id="mine")


class SlowStore(Store):
    """A store that writes a new generation when the test allows it, or fails."""

    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__(folder, seconds)
        self.writes = asyncio.Event()
        self.writing = asyncio.Event()
        self.full = False

    async def accept(self, record) -> None:
        """Waits for the test, then writes."""
        self.writing.set()
        await self.writes.wait()
        if self.full:
            raise errors.StateUnavailable("no room", retry_after=1)
        await super().accept(record)

    async def image(self, generation_id: str) -> bytes | None:
        """Fails like a disk with a bad sector while `full` is set."""
        if self.full:
            raise errors.StateUnavailable("bad sector")
        return await super().image(generation_id)


async def first_of(reading) -> tuple:
    """Returns the first update of `Generations.start` or `Generations.follow`, and the generation."""
    async with reading as reader:
        return (await anext(reader))[0], reader.generation


async def to_end(reading) -> Phase:
    """Reads to the end and returns its phase."""
    async with reading as reader:
        async for update, _ in reader:
            phase = update.state.phase
    return phase


async def leave(reader: asyncio.Task) -> None:
    """Cancels a reader, as a lost connection does."""
    reader.cancel()
    await asyncio.wait({reader})


class TestWhileItIsWritten:
    """No caller sees a generation before it is on disk, and a reader may disconnect during the write."""

    async def test_a_second_identical_request_waits_for_the_write(self, tmp_path: Path) -> None:
        """The first reader leaves during the write; the second one still gets the image."""
        store = await SlowStore.open(tmp_path)
        async with running_runtime(FakeEngine(), store=store) as runtime:
            start = runtime.generations.start
            first = asyncio.create_task(to_end(start(JOB, NAMED)))
            await store.writing.wait()
            second = asyncio.create_task(to_end(start(JOB, NAMED)))
            done, _ = await asyncio.wait({first, second}, timeout=0.05)
            assert not done
            await leave(first)
            store.writes.set()
            assert await second is Phase.SUCCEEDED
            async with start(JOB, NAMED) as reader:
                assert [each.generation_id for each in await store.load()] == [reader.generation.id]
        await store.close()

    async def test_keep_survives_a_disconnect_during_the_write(self, tmp_path: Path) -> None:
        """With KEEP, the generation runs although its caller left before it was written."""
        store = await SlowStore.open(tmp_path)
        async with running_runtime(FakeEngine(), store=store) as runtime:
            options = DeliveryOptions(on_disconnect=DisconnectPolicy.KEEP)
            reader = asyncio.create_task(first_of(runtime.generations.start(JOB, options)))
            await store.writing.wait()
            [generation] = runtime.generations.running
            await leave(reader)
            store.writes.set()
            await runtime.generations.idle()
            assert generation.events.state.phase is Phase.SUCCEEDED
        await store.close()

    async def test_a_disconnect_during_the_write_cancels(self, tmp_path: Path) -> None:
        """With CANCEL, the only caller left, and the same request starts a new generation."""
        store, engine = await SlowStore.open(tmp_path), FakeEngine()
        engine.hold()
        async with running_runtime(engine, store=store, max_queue=3) as runtime:
            start = runtime.generations.start
            reader = asyncio.create_task(first_of(start(JOB, NAMED)))
            await store.writing.wait()
            [generation] = runtime.generations.running
            await leave(reader)
            store.writes.set()
            engine.allow()
            assert await to_end(start(JOB, NAMED)) is Phase.SUCCEEDED
            assert generation.events.state.phase is Phase.CANCELLED
        await store.close()

    async def test_a_failed_write_aborts_and_can_be_repeated(self, tmp_path: Path) -> None:
        """With a full disk, the call fails with UNAVAILABLE; once there is room, the same request succeeds."""
        store, engine = await SlowStore.open(tmp_path), FakeEngine()
        engine.hold()
        store.writes.set()
        async with running_runtime(engine, store=store, max_queue=3) as runtime:
            start = runtime.generations.start
            store.full = True
            with pytest.raises(errors.StateUnavailable):
                await first_of(start(JOB, NAMED))
            [aborted] = runtime.generations.running
            store.full = False
            engine.allow()
            async with start(JOB, NAMED) as again:
                assert again.generation is not aborted
            assert await to_end(start(JOB, NAMED)) is Phase.SUCCEEDED
            assert aborted.ended
        await store.close()


async def test_ended_generations_expire_without_any_request(tmp_path: Path) -> None:
    """An idle server keeps no prompt and no image longer than configured, in memory and on disk."""
    store = await Store.open(tmp_path)
    async with running_runtime(FakeEngine(), store=store, retain_seconds=0.05) as runtime:
        assert await to_end(runtime.generations.start(JOB, DeliveryOptions())) is Phase.SUCCEEDED
        async with asyncio.timeout(20):
            while await store.load():  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.01)
    await store.close()


async def test_a_failed_removal_is_repeated(tmp_path: Path) -> None:
    """A generation that is no longer retained leaves the disk once the disk can be written again."""
    failed = threading.Event()

    def fail_once() -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(28, "No space left on device")

    store = await Store.open(tmp_path)
    with injected("store.forget", fail_once):
        async with running_runtime(FakeEngine(), store=store, retain_count=0) as runtime:
            assert await to_end(runtime.generations.start(JOB, DeliveryOptions())) is Phase.SUCCEEDED
    assert failed.is_set()
    assert await store.load() == []
    await store.close()


class TestAfterARestart:
    """Every stored generation that can be read is restored."""

    async def test_a_stop_removes_no_unfinished_generation(self, tmp_path: Path) -> None:
        """A server that retains few generations still runs all unfinished ones after a restart."""
        store = await Store.open(tmp_path)
        engine = FakeEngine()
        engine.hold()
        async with running_runtime(engine, store=store, retain_count=0) as runtime:
            started = [await self._start(runtime.generations) for _ in range(3)]
        assert [record.generation_id for record in await store.load()] == started
        await store.close()

    async def test_an_unreadable_image_does_not_prevent_the_start(self, tmp_path: Path) -> None:
        """The generation ends as failed; the others are restored."""
        store = await SlowStore.open(tmp_path)
        store.writes.set()
        async with running_runtime(FakeEngine(), store=store) as runtime:
            generation_id = await self._generate(runtime.generations)
        store.full = True
        async with running_runtime(FakeEngine(), store=store) as runtime:
            found = runtime.generations.find(generation_id, Caller(""))
            assert await to_end(runtime.generations.follow(found)) is Phase.FAILED
        await store.close()

    @staticmethod
    async def _start(generations) -> str:
        delivery = DeliveryOptions(on_disconnect=DisconnectPolicy.KEEP)
        async with generations.start(JOB, delivery) as reader:
            return reader.generation.id

    @staticmethod
    async def _generate(generations) -> str:
        async with generations.start(JOB, DeliveryOptions()) as reader:
            async for _ in reader:
                pass
        return reader.generation.id
