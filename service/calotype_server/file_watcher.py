"""Reloads files that change while the server runs: API keys and certificates.

It polls instead of using a library such as watchfiles, which is built on inotify, because the files are often
Kubernetes secrets or on network file systems. Kubernetes replaces a secret by switching a symbolic link in a parent
folder, and network file systems send no notifications, so events for the files themselves never arrive. A few `stat`
calls per second cost nothing.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import structlog

from calotype_server import threads
from calotype_server.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["FileWatcher"]

_log = structlog.get_logger(__name__)

_INTERVAL_SECONDS = 0.5

_MAX_UNSETTLED_CHECKS = 3
"""Files that change more often than they are checked are read at every third check."""

_STOP_SECONDS = 1.0
"""Time for a check in progress to end; then it is left behind."""


class FileWatcher:
    """Calls a function when a file is changed, replaced, created or deleted.

    A changed file is read when it has not changed since the check before, so that files that are written slowly or one
    after the other are read complete. After a failure, every check tries again, because some causes, such as a missing
    permission, end without a change of the file. Each failure is logged once.

    The checks run in a daemon thread of their own. So no exception in them, and no file system that hangs, can stop the
    server or delay its exit.

    Args:
        files: The files to watch.
        reload: Called after a change. It must keep the old content in use when it raises, which it may do with any
            exception.
        interval: Seconds between two checks.
    """

    def __init__(
        self, files: Sequence[Path], reload: Callable[[], None], *, interval: float = _INTERVAL_SECONDS
    ) -> None:
        self._files = files
        self._names = [str(path) for path in files]
        self._reload = reload
        self._interval = interval
        self._loaded = self._previous = self._read_identities()
        self._unsettled_checks = 0
        self._failure: str | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts watching in the background."""
        if self._files:
            self._thread = threads.start("files", self._run)

    async def stop(self) -> None:
        """Stops watching. Does nothing if the watcher is not running. Waits at most 1 s for a disk that hangs."""
        self._stopped.set()
        if self._thread is not None:
            # In a thread of its own, because the event loop still serves the last calls.
            await threads.run("files-stop", self._thread.join, _STOP_SECONDS)

    def check(self) -> None:
        """Calls `reload` if the files have changed since they were loaded, and are the same as at the last check."""
        try:
            if self._is_due():
                self._reload()
                self._failure = None
                _log.info("files reloaded", files=self._names)
        except BaseException as error:
            # Also those of libraries that do not derive from Exception, such as panics in Rust.
            failure, self._failure = self._failure, f"{type(error).__name__}: {error}"
            if self._failure == failure:
                return
            if isinstance(error, StartupError):
                _log.warning("files not reloaded, the old ones stay in use", files=self._names, error=str(error))
            else:
                _log.exception("files not reloaded, the old ones stay in use", files=self._names)

    def _is_due(self) -> bool:
        """Looks at the files, and returns whether to reload them now."""
        identities = self._read_identities()
        settled = identities == self._previous
        self._previous = identities
        if identities == self._loaded and self._failure is None:
            return False
        self._unsettled_checks = 0 if settled else self._unsettled_checks + 1
        if not settled and self._unsettled_checks < _MAX_UNSETTLED_CHECKS:
            return False
        self._unsettled_checks = 0
        # Taken before reading the files, so that the next check notices changes made while they are read.
        self._loaded = identities
        return True

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            # `check` logs every failure itself, so this one comes from the log, such as from a full disk.
            with contextlib.suppress(BaseException):
                self.check()

    def _read_identities(self) -> list[tuple[int, ...] | None]:
        return [_identity(path) for path in self._files]


def _identity(path: Path) -> tuple[int, ...] | None:
    """Returns numbers that change with the content of a file, following links; None when the file cannot be read.

    The time of modification alone is not enough: programs that copy files set it, and it may stay the same.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
