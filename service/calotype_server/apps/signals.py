"""SIGTERM and SIGINT as events of the event loop."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, TypeVar

from calotype_server.generations.watchdog import EXIT_STALLED

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Signals"]

_STOP_SECONDS = 25.0
"""Longest time from the end of a drain to the end of the process. Its parts wait for threads (8 s, then 3 s), the disk
(three times 3 s), the last messages (2 s) and the last spans (2 s), if these do not respond."""

T = TypeVar("T")


class Signals:
    """Handles SIGTERM and SIGINT: the first signal asks to stop, the second to hurry. Both limit the time of the stop.

    Args:
        drain_seconds: Time for running work to finish after the first signal.
        exit_after: Called with the longest time until the process ends, in seconds, and the exit code to end it with
            after that. None sets no limit.

    Attributes:
        hurry: Set by the second signal.
    """

    def __init__(self, drain_seconds: float, exit_after: Callable[[float, int], None] | None = None) -> None:
        self._drain_seconds = drain_seconds
        self._exit_after = exit_after
        self.hurry = asyncio.Event()
        self._stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self.limit_stop(self._drain_seconds)
        elif not self.hurry.is_set():
            self.hurry.set()
            self.limit_stop(0)

    def limit_stop(self, drain_seconds: float) -> None:
        """Ends the process if it still runs 25 s after a drain of this length, even if the event loop hangs."""
        if self._exit_after is not None:
            self._exit_after(drain_seconds + _STOP_SECONDS, EXIT_STALLED)

    @property
    def stopped(self) -> bool:
        """Whether the first signal has arrived."""
        return self._stop.is_set()

    async def stopping(self) -> None:
        """Waits for the first signal."""
        await self._stop.wait()

    async def unless_stopped(self, work: Coroutine[object, object, T]) -> T | None:
        """Returns the result of `work`; cancels it and returns None if the first signal arrives before it is done."""
        return await _unless(self._stop, work)

    async def unless_hurried(self, work: Coroutine[object, object, T]) -> T | None:
        """Returns the result of `work`; cancels it and returns None if the second signal arrives before it is done."""
        return await _unless(self.hurry, work)


async def _unless(event: asyncio.Event, work: Coroutine[object, object, T]) -> T | None:
    task, waiter = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        waiter.cancel()
        if task.cancel():
            await asyncio.wait({task})
