"""Files that are read again when they have changed, without a restart."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

from calotype_server.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["FileWatcher"]

_log = structlog.get_logger(__name__)

_INTERVAL_SECONDS = 1.0


class FileWatcher:
    """Looks at files every second; polling sees what is renamed, linked and mounted alike.

    Args:
        files: What to look at.
        reload: Called, in a thread, when one has changed. A `StartupError` of it is logged: what was read before holds.
    """

    def __init__(self, files: Sequence[Path], reload: Callable[[], None]) -> None:
        self._files = files
        self._reload = reload
        self._seen = self._look()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look."""
        if self._files:
            self._task = asyncio.create_task(self._run(), name="watched-files")

    async def stop(self) -> None:
        """Looks no more. Can be called again, and without a start."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def check(self) -> None:
        """Looks once."""
        # Before reading: what changes meanwhile is seen the next time.
        now = self._look()
        if now == self._seen:
            return
        self._seen = now
        names = [str(path) for path in self._files]
        try:
            self._reload()
        except StartupError as error:
            _log.warning("files not reloaded, the old ones stay in use", files=names, error=str(error))
        else:
            _log.info("files reloaded", files=names)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            await asyncio.to_thread(self.check)

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_identity(path) for path in self._files]


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
