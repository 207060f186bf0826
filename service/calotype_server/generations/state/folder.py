"""The state folder: its lock, and errors that tell the operator why it cannot be used."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from typing import TYPE_CHECKING, Final, Self

from calotype_server import errors

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

__all__ = ["FILE", "FolderInUse", "Lock", "primary_code", "unusable"]

FILE: Final = "calotype.sqlite3"
_LOCK: Final = "calotype.lock"


class FolderInUse(errors.StateUnusable):
    """Another process uses the folder."""


class Lock:
    """An exclusive lock on a state folder, until `close` or until the process exits. Creates the folder if needed.

    Raises:
        FolderInUse: Another process holds the lock.
        StateUnusable: The folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        try:
            # Only the owner may read prompts and images.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise unusable(self.path, error) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            if isinstance(error, BlockingIOError):
                raise _in_use(self.path) from None
            raise unusable(self.path, error) from None

    def close(self) -> None:
        """Releases the lock."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def unusable(path: Path, error: Exception) -> errors.StateUnusable:
    """Returns an error for the operator: why the file cannot be opened, and what to do."""
    if primary_code(error) == sqlite3.SQLITE_BUSY:
        return _in_use(path)
    return errors.StateUnusable(
        f"--state: {path} cannot be opened ({getattr(error, 'strerror', None) or error})."
        " Choose a folder that this user may write to, on a disk with free space."
    )


def _in_use(path: Path) -> FolderInUse:
    return FolderInUse(f"--state: {path} is in use by another server. Each server needs its own folder.")


def primary_code(error: Exception) -> int:
    """Returns SQLite's primary code, or 0 for an error that is not one of SQLite's; the other bits are details."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
