"""A disk that hangs fails every call in bounded time, and the state recovers by itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from calotype_server import errors
from calotype_server.failpoints import injected
from calotype_server.generations.records import Record
from calotype_server.generations.store import Store
from calotype_server.types import DeliveryOptions, Failed, Job
from support.engine.fake_engine import FakeEngine
from support.hangs.frozen_disk import FrozenDisk
from support.runtime import running_runtime

if TYPE_CHECKING:
    from pathlib import Path

JOB = Job("a cat", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")


async def fails(store: Store) -> bool:
    """Returns whether a call fails as documented."""
    try:
        await store.image("unknown")
    except errors.StateUnavailable as error:
        return error.retry_after is not None
    return False


async def test_a_call_that_hangs_fails_and_the_state_recovers(tmp_path: Path) -> None:
    """Later calls fail at once, without a new call of the disk, until the first one returns. The log shows both."""
    disk = FrozenDisk()
    async with Store.opened(tmp_path) as store:
        assert not await fails(store)
        with capture_logs() as logged:
            with disk.frozen(store):
                assert await fails(store)
                assert store.problem == "The state folder does not respond."
                assert [await fails(store) for _ in range(5)] == [True] * 5
                assert disk.calls == 1
            await store.responsive()
        assert store.problem is None
        assert not await fails(store)
    events = [line["event"] for line in logged]
    assert events == ["the state folder does not respond", "the state folder responds again"]
    assert "calotype-store_0" in logged[0]["stacks"]


async def test_calls_behind_one_that_hangs_never_happen(tmp_path: Path) -> None:
    """A call that failed while it waited has no effect later."""
    disk = FrozenDisk()
    record = Record("a-1", JOB, DeliveryOptions(), 1.0)
    async with Store.opened(tmp_path) as store:
        with disk.frozen(store):
            found = await asyncio.gather(store.image("unknown"), store.accept(record), return_exceptions=True)
            assert [type(each) for each in found] == [errors.StateUnavailable] * 2
        await store.responsive()
        assert await store.load() == []


async def test_a_harmful_exception_in_a_call_is_an_ordinary_failure(tmp_path: Path) -> None:
    """`SystemExit` in the thread of the store becomes a typed error, and the next call succeeds."""

    def leave() -> None:
        raise SystemExit(3)

    async with Store.opened(tmp_path) as store:
        with injected("store.call", leave):
            assert await fails(store)
        assert not await fails(store)


async def test_an_idle_server_notices_a_disk_that_hangs(tmp_path: Path) -> None:
    """A check without any call finds it, and a probe finds out that the disk responds again."""
    disk = FrozenDisk()
    async with Store.opened(tmp_path) as store:
        await store.touch()
        with disk.frozen(store):
            with pytest.raises(errors.StateUnavailable):
                await store.touch()
            assert store.problem is not None
        await store.responsive()
        await store.probe()
        assert store.problem is None


async def test_an_idle_server_notices_a_folder_that_cannot_be_changed(tmp_path: Path) -> None:
    """A folder that vanished, or a file system that became read-only, is a problem until it is back."""
    folder, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    async with Store.opened(folder) as store:
        folder.rename(elsewhere)
        with pytest.raises(errors.StateUnavailable):
            await store.touch()
        assert store.problem == "The server cannot access its state right now."
        elsewhere.rename(folder)
        await store.probe()
        assert store.problem is None


async def test_a_store_that_hangs_can_be_closed(tmp_path: Path) -> None:
    """Closing waits only briefly; the exit of the process then closes the file."""
    disk, store = FrozenDisk(), await Store.open(tmp_path)
    with capture_logs() as logged, disk.frozen(store):
        await store.close()
    assert "the state was not closed" in [line["event"] for line in logged]
    await store.responsive()


async def test_opening_a_folder_that_hangs_can_be_cancelled(tmp_path: Path) -> None:
    """A signal can stop a server whose disk hangs at the start."""
    disk = FrozenDisk()
    with disk.frozen():
        opening = asyncio.create_task(Store.open(tmp_path))
        assert await asyncio.to_thread(disk.hangs.acquire, timeout=20)
        opening.cancel()
        await asyncio.wait({opening})
        assert opening.cancelled()


async def test_a_rejected_generation_does_not_return_after_a_restart(tmp_path: Path) -> None:
    """If accepting it timed out, the caller gets an error; when the disk returns, no trace of it is left."""
    disk = FrozenDisk()
    async with Store.opened(tmp_path) as store:
        async with running_runtime(FakeEngine(), store=store) as runtime:
            with disk.frozen(store):
                with pytest.raises(errors.StateUnavailable):
                    async with runtime.generations.start(JOB, DeliveryOptions()):
                        pass
                await runtime.generations.idle()
                [generation] = runtime.generations.retained
                assert isinstance(generation.events.state.end, Failed)
                assert isinstance(generation.events.state.end.error, errors.StateUnavailable)
                assert disk.calls == 1
            await store.responsive()
        assert await store.load() == []
