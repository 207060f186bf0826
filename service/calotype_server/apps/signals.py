"""SIGTERM and SIGINT as events of the loop."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["Signals"]

T = TypeVar("T")


class Signals:
    """The first SIGTERM or SIGINT asks to stop, the second to hurry."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    @property
    def stopped(self) -> bool:
        """Whether the first signal has come."""
        return self._stop.is_set()

    async def stopping(self) -> None:
        """Waits for the first signal."""
        await self._stop.wait()

    async def unless_stopped(self, work: Coroutine[object, object, T]) -> T | None:
        """Returns what `work` returns, or None when the first signal comes before."""
        return await _unless(self._stop, work)

    async def unless_hurried(self, work: Coroutine[object, object, T]) -> T | None:
        """Returns what `work` returns, or None when the second signal comes before."""
        return await _unless(self._hurry, work)


async def _unless(event: asyncio.Event, work: Coroutine[object, object, T]) -> T | None:
    """Awaits `work`, but gives up and returns None as soon as `event` is set."""
    task, waiter = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return None
        return task.result()
    finally:
        task.cancel()
        waiter.cancel()
