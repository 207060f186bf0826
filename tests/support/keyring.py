"""An API key file for tests, the keys in clear text, and how a server notices a change of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.auth import keys
from calotype_server.auth.access import Access
from calotype_server.auth.keys import KeyRecord

if TYPE_CHECKING:
    from pathlib import Path

    from calotype_server.file_watcher import FileWatcher


class Keyring:
    """Keys by name, and the `Access` that accepts them.

    Args:
        path: Of the file, which is created.

    Attributes:
        time: Seconds that the clocks for expiry and rates show.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.time = 1_800_000_000.0
        self.path.touch()
        self._keys: dict[str, str] = {}

    def add(self, name: str, **fields: Any) -> str:
        """Creates a key and returns it."""
        self._keys[name] = keys.make(name)
        keys.append(self.path, KeyRecord(id=name, sha256=keys.digest(self._keys[name]), **fields))
        return self._keys[name]

    def metadata(self, name: str) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call with that key."""
        return (("authorization", f"Bearer {self._keys[name]}"),)

    def access(self) -> Access:
        """Returns the `Access` of the file."""
        return Access(self.path, now=lambda: self.time, clock=lambda: self.time)


def notice_change(watcher: FileWatcher) -> None:
    """Makes a watcher read the files that have changed: it notices a change first, and reads files that rest."""
    watcher.check()
    watcher.check()
