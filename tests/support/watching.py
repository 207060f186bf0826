"""Makes a file watcher notice changes without waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calotype_server.file_watcher import FileWatcher

__all__ = ["notice_change"]


def notice_change(watcher: FileWatcher) -> None:
    """Makes a watcher read the files that have changed: it notices a change first, and reads files that rest."""
    watcher.check()
    watcher.check()
