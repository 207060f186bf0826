"""Remembers which groups were cancelled, so that members that arrive later are rejected."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_CALLERS", "MAX_GROUPS", "SECONDS", "Tombstones"]

SECONDS: Final = 60.0
"""How long a cancelled group accepts no members: longer than a request travels, retries included."""

MAX_GROUPS: Final = 1024
"""Cancelled groups that are remembered for each caller."""

MAX_CALLERS: Final = 64
"""Callers whose cancelled groups are remembered. A group needs about 300 bytes, so all of them need 20 MB."""


class Tombstones:
    """The groups that were cancelled recently. Not thread-safe.

    Bounded: a caller that cancels many groups only makes the server forget its own oldest ones.

    Args:
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: OrderedDict[str, OrderedDict[str, float]] = OrderedDict()
        """When each group is forgotten, by caller and group. Both levels are ordered by their last cancel."""

    def add(self, caller: str, group: str) -> None:
        """Remembers that a caller's group was cancelled now."""
        now = self._clock()
        groups = self._until.setdefault(caller, OrderedDict())
        groups[group] = now + SECONDS
        groups.move_to_end(group)
        self._until.move_to_end(caller)
        while len(groups) > MAX_GROUPS or _oldest(groups) <= now:
            groups.popitem(last=False)
        while len(self._until) > MAX_CALLERS or _newest(next(iter(self._until.values()))) <= now:
            self._until.popitem(last=False)

    def has(self, caller: str, group: str) -> bool:
        """Whether a caller's group was cancelled within the last `SECONDS`."""
        groups = self._until.get(caller)
        return groups is not None and groups.get(group, -math.inf) > self._clock()

    def __len__(self) -> int:
        return sum(map(len, self._until.values()))


def _oldest(groups: OrderedDict[str, float]) -> float:
    return next(iter(groups.values()))


def _newest(groups: OrderedDict[str, float]) -> float:
    return next(reversed(groups.values()))
