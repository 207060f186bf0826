"""Estimates how long a start still takes, so that rejected callers know when to try again."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from calotype_server import threads

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["LoadTime"]

_LEAST_SECONDS = 1.0
_MOST_SECONDS = 30.0
"""Bounds the loss when the estimate is wrong, for example because the last start downloaded the model."""


class LoadTime:
    """Measures this start and compares it with the last start of the same model, which a file in the cache keeps.

    Args:
        cache_dir: Folder of all caches; load times are in `load_times` below it.
        model: Name of the model.
        clock: Returns monotonic time in seconds.
    """

    def __init__(self, cache_dir: Path, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        name = hashlib.sha256(model.encode()).hexdigest()[:32]
        self._path = cache_dir.expanduser() / "load_times" / name
        self._clock = clock
        self._started = clock()
        self._expected = self._read()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def remaining(self) -> float:
        """Estimates the seconds until the server is ready, 1 to 30.

        That is the rest of the last load time. Once the start takes longer, or if there was no start before, the best
        guess is that it takes as long again as it is overdue: https://en.wikipedia.org/wiki/Lindy_effect.
        """
        return min(max(abs(self._expected - self.seconds), _LEAST_SECONDS), _MOST_SECONDS)

    def save(self) -> threading.Thread:
        """Keeps the duration of this start for the next one. Call it when the server is ready.

        Returns:
            The thread that writes the file. A hung disk does not delay the server or its exit.
        """
        content = f"{self.seconds:.3f}\n".encode()

        def write() -> None:
            from calotype_server.engine.disk_cache import write_atomically  # imports torch, which delays the start

            write_atomically(self._path, content, kind="load time")

        return threads.start("load-time", write)

    def _read(self) -> float:
        try:
            seconds = float(self._path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0.0
        return seconds if 0 <= seconds < float("inf") else 0.0
