"""Repeats failed writes of changes that must not get lost: first while the caller waits, then in the background."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

import structlog

from calotype_server import errors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["StateWriter"]

_log = structlog.get_logger(__name__)

_PATIENCE_SECONDS: Final = 5.0
"""Longest time that a caller waits for a write."""

_FIRST_DELAY_SECONDS: Final = 0.1
_LONGEST_DELAY_SECONDS: Final = 10.0
"""Delays between two attempts; each is twice the previous one."""


class StateWriter:
    """Repeats failed writes until they succeed or the server stops. Lives in the event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[bool]] = set()
        self._stopping = asyncio.Event()

    def start(self, name: str, write: Callable[[], Awaitable[None]]) -> asyncio.Task[bool]:
        """Starts to write without waiting. The task returns whether the change is durable; it raises nothing.

        Args:
            name: Names the change in the log.
            write: Makes the change; it may be called several times. Raises `ServiceError` if it fails.
        """
        task = asyncio.create_task(self._repeat(name, write))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def try_for_a_while(self, name: str, write: Callable[[], Awaitable[None]]) -> bool:
        """Writes, and waits for at most 5 s. Returns whether the change is durable. Arguments as for `start`.

        If it is not, further attempts follow in the background.
        """
        task = self.start(name, write)
        await asyncio.wait({task}, timeout=_PATIENCE_SECONDS)
        return task.done() and task.result()

    async def settle(self) -> None:
        """Makes a last attempt for each pending change and waits for it. Call this when the server stops."""
        self._stopping.set()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _repeat(self, name: str, write: Callable[[], Awaitable[None]]) -> bool:
        delay = _FIRST_DELAY_SECONDS
        failed = False
        while True:
            stopping = self._stopping.is_set()
            try:
                await write()
            except errors.ServiceError:
                if stopping:
                    _log.error("a change of the state is lost because the server stops", change=name)
                    return False
                failed = True
            else:
                if failed:
                    _log.info("a change of the state was repeated successfully", change=name)
                return True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)
