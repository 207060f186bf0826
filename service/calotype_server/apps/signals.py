"""SIGTERM and SIGINT as events of the event loop."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Signals"]

T = TypeVar("T")


class Signals:
    """Handles SIGTERM and SIGINT: the first signal asks to stop, the second to hurry.

    Args:
        on_stop: Called at the first signal.
        on_hurry: Called at the second signal.

    Attributes:
        hurry: Set by the second signal.
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None, on_hurry: Callable[[], None] = lambda: None) -> None:
        self._on_stop = on_stop
        self._on_hurry = on_hurry
        self.hurry = asyncio.Event()
        self._stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._on_stop()
        elif not self.hurry.is_set():
            self.hurry.set()
            self._on_hurry()

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
