"""What has ended is kept for a while, bounded in time, number and bytes: a reload or a dropped link loses nothing."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Retention"]

T = TypeVar("T")


class Retention(Generic[T]):
    """Keeps the youngest, and forgets the oldest when there are too many, too large or too old. Not thread-safe.

    Args:
        seconds: How long something is kept at most.
        count: How many are kept at most.
        size: Bytes that are kept at most in all.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        *,
        seconds: float,
        count: int,
        size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._count = count
        self._size = size
        self.on_forget: Callable[[T], None] = lambda _: None
        """Told of whatever is forgotten."""
        self.reserved: Callable[[], int] = lambda: 0
        """Tells the bytes that something else takes of `size`."""
        self._clock = clock
        self._kept: OrderedDict[str, tuple[float, int, T]] = OrderedDict()
        self.size = 0
        """Bytes kept now."""

    def add(self, key: str, value: T, size: int) -> None:
        """Keeps something of `size` bytes from now on. What is too large by itself is forgotten at once."""
        self._kept[key] = self._clock() + self._seconds, size, value
        self.size += size
        self.expire()

    def get(self, key: str) -> T | None:
        """Returns what is kept under a key, or None."""
        self.expire()
        found = self._kept.get(key)
        return None if found is None else found[2]

    def expire(self) -> float | None:
        """Forgets what is to be forgotten; returns the seconds until there will be more, or None."""
        now = self._clock()
        while self._kept:
            key, (until, size, value) = next(iter(self._kept.items()))
            if until > now and len(self._kept) <= self._count and self.size + self.reserved() <= self._size:
                return until - now
            del self._kept[key]
            self.size -= size
            self.on_forget(value)
        return None

    def __iter__(self) -> Iterator[T]:
        """The youngest first."""
        self.expire()
        return (value for _, _, value in reversed(list(self._kept.values())))

    def __len__(self) -> int:
        return len(self._kept)
