"""Makes quiet generations publish heartbeats, so that readers can tell a quiet server from a dead one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from calotype_server.generations.generation import Generation

__all__ = ["Heartbeats"]


class Heartbeats:
    """A timer for all running generations. Lives in the event loop.

    Args:
        running: The running generations, as they are at each beat.
        seconds: Interval after which a generation without an event publishes a heartbeat.
    """

    def __init__(self, running: Collection[Generation], seconds: float) -> None:
        self._running = running
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Starts the timer, unless it runs. It stops by itself when no generation runs."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._beat)

    def close(self) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        self._timer = None
        for generation in self._running:
            generation.heartbeat(self._seconds)
        if self._running:
            self.start()
