"""A server in this process that can crash at any moment: between two steps of the event loop, or inside its store."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from typing import TYPE_CHECKING

from calotype_server.failpoints import FAILPOINTS, injected
from calotype_server.generations.store import Store
from support.engine.fake_engine import FakeEngine
from support.faults import full_disk
from support.history.rows import copy_state
from support.runtime import running_runtime

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path
    from typing import Any

    from calotype_server.apps.runtime import Runtime
    from calotype_server.observability.events import Observe

__all__ = ["STORE_POINTS", "CrashingServer"]

STORE_POINTS = sorted(name for name in FAILPOINTS if name.startswith("store."))
_READING = {"store.open", "store.load", "store.call"}
_RETAINED = 3


class CrashingServer:
    """A runtime with a state folder whose process can "crash".

    A crash copies the folder as it is at that moment, as the kernel would keep the files of a killed process. The next
    start uses the copy; the rest of the old process only ever touches the old folder.

    Args:
        folder: A new folder for the state and its copies.
        observe: Receives the events of processes that have not crashed.

    Attributes:
        runtime: The running server.
        engine: Its engine, whose steps wait for `FakeEngine.allow`.
        slots: Its number of slots.
        max_queue: Its number of places in the queue.
        full: Whether each write fails because the disk is full.
        crashed: Whether the process stopped inside its store; `start` starts the next one.
    """

    runtime: Runtime
    engine: FakeEngine

    def __init__(self, folder: Path, observe: Observe) -> None:
        self.slots = self.max_queue = 0
        self.full = False
        self.crashed = asyncio.Event()
        self._folder = folder
        self._observe = observe
        self._number = 0
        self._crash_at = ""
        self._crash_folder: Path | None = None
        self._crashing = threading.Lock()
        self._released = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._stack = contextlib.AsyncExitStack()
        self._failpoints = contextlib.ExitStack()
        for name in STORE_POINTS:
            self._failpoints.enter_context(injected(name, functools.partial(self._visit, name)))

    @property
    def state(self) -> Path:
        """The folder that the next start uses."""
        return self._folder / str(self._number)

    @property
    def has_crashed(self) -> bool:
        """Whether the process is dead, also if the event loop does not know it yet."""
        return self._crash_folder is not None

    async def start(self, slots: int, max_queue: int) -> None:
        """Starts a process on the newest state."""
        if self._crash_folder is not None:
            self._number, self._crash_folder = self._number + 1, None
        self._crash_at = ""
        self.crashed.clear()
        self.engine, self.slots, self.max_queue = FakeEngine(), slots, max_queue
        self.engine.hold()
        self._stack = contextlib.AsyncExitStack()
        store = await self._stack.enter_async_context(Store.opened(self.state))
        self.runtime = await self._stack.enter_async_context(
            running_runtime(
                self.engine,
                store=store,
                observe=lambda event: None if self._crash_folder else self._observe(event),
                max_active=slots,
                max_queue=max_queue,
                retain_count=_RETAINED,
                retain_bytes=2**20,
            )
        )

    async def stop(self) -> None:
        """Stops the process in order."""
        await self._stack.aclose()

    async def crash(self) -> None:
        """Stops the process without anything that happens after this moment."""
        if self._crash_folder is None:
            self._copy()
        self._released.set()
        # Cleans up this process only: its folder is no longer in use.
        await self._stack.aclose()
        self._released.clear()

    def crash_at(self, name: str) -> None:
        """Makes the process crash the next time that it reaches a failpoint of the store; "" for none."""
        with self._crashing:
            self._crash_at = name

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Returns the result of `work`, or None if the process crashed first."""
        task, crash = asyncio.ensure_future(work), asyncio.ensure_future(self.crashed.wait())
        await asyncio.wait({task, crash}, return_when=asyncio.FIRST_COMPLETED)
        crash.cancel()
        if not self.crashed.is_set():
            return task.result()
        # Otherwise a stop would wait for the store of the dead process.
        self._released.set()
        task.cancel()
        await asyncio.wait({task})
        return None

    def abandon(self) -> None:
        """Removes the faults, also if a test has failed."""
        self._released.set()
        self._failpoints.close()

    def _visit(self, name: str) -> None:
        with self._crashing:
            if name == self._crash_at and self._crash_folder is None:
                self._copy()
                self._loop.call_soon_threadsafe(self.crashed.set)
        if self._crash_folder is not None:
            # A dead process does nothing more. It continues only to be cleaned up.
            self._released.wait()
        elif self.full and name not in _READING:
            raise full_disk()

    def _copy(self) -> None:
        self._crash_folder = self._folder / str(self._number + 1)
        copy_state(self.state, self._crash_folder)
