"""A disk that does not respond, as a frozen file system or a network file system without its server."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from calotype_server.failpoints import injected

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calotype_server.generations.store import Store

_BRIEF_SECONDS = 0.02


class FrozenDisk:
    """While it is frozen, every call of a store hangs.

    Attributes:
        calls: Number of calls that reached the disk while it was frozen.
        hangs: Released by each of them.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.hangs = threading.Semaphore(0)
        self._thawed = threading.Event()

    def _hang(self) -> None:
        self.calls += 1
        self.hangs.release()
        self._thawed.wait()

    @contextlib.contextmanager
    def frozen(self, store: Store | None = None) -> Iterator[None]:
        """Freezes the disk for the duration of the block.

        Args:
            store: Gets a short timeout for the block. With a short timeout at other times, a slow disk fails a test.
        """
        seconds = 0.0 if store is None else store._thread.seconds
        with injected("store.call", self._hang):
            try:
                if store is not None:
                    store._thread.seconds = _BRIEF_SECONDS
                yield
            finally:
                if store is not None:
                    store._thread.seconds = seconds
                self._thawed.set()
