"""Retains ended generations for a while, bounded in time, number and bytes, so that callers can still watch them."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Retention", "RetentionLimits"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """Bounds of the retained items.

    Attributes:
        seconds: Longest time that an item is retained.
        count: Largest number of items.
        size: Largest total size in bytes, including what else is reserved.
    """

    seconds: float
    count: int
    size: int


class Retention(Generic[T]):
    """Retains the newest items and drops the oldest when there are too many, too large or too old. Not thread-safe.

    Args:
        limits: Bounds of the retained items.
        on_drop: Called with each item that is dropped.
        reserved: Returns the bytes of `limits.size` that something else uses.
        clock: A monotonic clock, in seconds.

    Attributes:
        size: Total size of the retained items, in bytes.
    """

    def __init__(
        self,
        limits: RetentionLimits,
        *,
        on_drop: Callable[[T], None] = lambda _: None,
        reserved: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._on_drop = on_drop
        self._reserved = reserved
        self._clock = clock
        self._items: OrderedDict[str, tuple[float, int, T]] = OrderedDict()
        self.size = 0

    def add(self, key: str, value: T, size: int) -> None:
        """Retains an item of `size` bytes. An item that is larger than the limit is dropped at once."""
        self._items[key] = self._clock() + self._limits.seconds, size, value
        self.size += size
        self.expire()

    def get(self, key: str) -> T | None:
        """Returns the item with this key, or None."""
        self.expire()
        found = self._items.get(key)
        return None if found is None else found[2]

    def expire(self) -> float | None:
        """Drops items that exceed a limit. Returns the seconds until the next one expires; None if none is left."""
        now = self._clock()
        while self._items:
            key, (until, size, value) = next(iter(self._items.items()))
            fits = len(self._items) <= self._limits.count and self.size + self._reserved() <= self._limits.size
            if until > now and fits:
                return until - now
            del self._items[key]
            self.size -= size
            self._on_drop(value)
        return None

    def __iter__(self) -> Iterator[T]:
        """Iterates over the items, newest first."""
        self.expire()
        return (value for _, _, value in reversed(list(self._items.values())))

    def __len__(self) -> int:
        return len(self._items)
