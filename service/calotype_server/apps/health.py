"""Keeps health checks true: the server is not serving while a part of it hangs, and serves again when it recovers."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

__all__ = ["HealthReporter"]

_log = structlog.get_logger(__name__)

_INTERVAL_SECONDS = 1.0


class HealthReporter:
    """Reports changes of the health.

    Args:
        problems: Returns what is wrong now, without secrets; an empty list if nothing is.
        set_serving: Sets the result of all health checks.
    """

    def __init__(self, problems: Callable[[], list[str]], set_serving: Callable[[bool], Awaitable[None]]) -> None:
        self._problems = problems
        self._set_serving = set_serving
        self._known: list[str] | None = None

    async def check(self) -> None:
        """Reports the health if it has changed since the last check, or if this is the first one."""
        problems = self._problems()
        if problems == self._known:
            return
        if problems:
            _log.error("not serving", problems=problems)
        elif self._known:
            _log.info("serving again")
        self._known = problems
        await self._set_serving(not problems)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Checks at once, and then every second during the block. At its end the server is not serving."""
        await self.check()
        checking = asyncio.create_task(self._run(), name="health")
        try:
            yield
        finally:
            checking.cancel()
            await asyncio.wait({checking})
            await self._set_serving(False)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            try:
                await self.check()
            except Exception:
                _log.exception("the health could not be checked")
