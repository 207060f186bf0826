"""Reloads files that change while the server runs: API keys and certificates.

It polls instead of using a library such as watchfiles, which is built on inotify, because the files are often
Kubernetes secrets or on network file systems. Kubernetes replaces a secret by switching a symbolic link in a parent
folder, and network file systems send no notifications, so events for the files themselves never arrive. A few `stat`
calls per second cost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

from calotype_server import threads
from calotype_server.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["FileWatcher"]

_log = structlog.get_logger(__name__)

_INTERVAL_SECONDS = 1.0


class FileWatcher:
    """Calls a function when a file is changed, replaced, created or deleted.

    Args:
        files: The files to watch.
        reload: Called in a thread after a change. Any exception is logged, and watching continues: `reload` must keep
            the old content in use when it raises.
        interval: Seconds between two checks.
    """

    def __init__(
        self, files: Sequence[Path], reload: Callable[[], None], *, interval: float = _INTERVAL_SECONDS
    ) -> None:
        self._files = files
        self._reload = reload
        self._interval = interval
        self._identities = self._read_identities()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts watching in the background; needs a running event loop."""
        if self._files:
            self._task = asyncio.create_task(self._run(), name="file-watcher")

    async def stop(self) -> None:
        """Stops watching. Does nothing if the watcher is not running."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def check(self) -> None:
        """Calls `reload` if a file has changed since the last check."""
        # Taken before reading the files, so that the next check notices changes made while they are read.
        identities = self._read_identities()
        if identities == self._identities:
            return
        self._identities = identities
        names = [str(path) for path in self._files]
        try:
            self._reload()
        except StartupError as error:
            _log.warning("files not reloaded, the old ones stay in use", files=names, error=str(error))
        except Exception:
            _log.exception("files not reloaded, the old ones stay in use", files=names)
        else:
            _log.info("files reloaded", files=names)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await threads.run("files", self.check)

    def _read_identities(self) -> list[tuple[int, int, int] | None]:
        return [_identity(path) for path in self._files]


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Returns inode, size and time of modification, following links; None when the file cannot be read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
