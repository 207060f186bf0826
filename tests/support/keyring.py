"""A file of API keys for tests, and the keys that nobody else has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.auth import keys
from calotype_server.auth.access import Access
from calotype_server.auth.keys import KeyRecord

if TYPE_CHECKING:
    from pathlib import Path


class Keyring:
    """Keys by name, and the `Access` that they open.

    Args:
        path: Of the file, which is made.

    Attributes:
        time: What the clocks show, in seconds; for expiry and for rates.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.time = 1_800_000_000.0
        self.path.touch()
        self._keys: dict[str, str] = {}

    def add(self, name: str, **fields: Any) -> str:
        """Makes a key and returns it."""
        self._keys[name] = keys.make(name)
        keys.append(self.path, KeyRecord(id=name, sha256=keys.digest(self._keys[name]), **fields))
        return self._keys[name]

    def metadata(self, name: str) -> tuple[tuple[str, str], ...]:
        """What a call of that key's bearer carries."""
        return (("authorization", f"Bearer {self._keys[name]}"),)

    def access(self) -> Access:
        """Reads the file."""
        return Access(self.path, now=lambda: self.time, clock=lambda: self.time)
