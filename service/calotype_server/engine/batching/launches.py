"""The batches that a device works on: how many it was given, and when to give it the next one."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.engine.batching.pending import PendingCall

__all__ = ["Launches"]

_MOST = 2
"""One batch that is computed, and one that follows without a pause."""

_LEAD = 0.25
"""The next batch is launched when this share of the step before and of a launch is left. A device computes the first
operations while the rest is launched, so the lead covers the beginning of a launch and errors of the prediction."""

_LEAST_LEAD_SECONDS = 0.005
"""Python's lock and the sleep of a thread may delay a launch by milliseconds. The batches of a device that is faster
are launched at once: to wait for the right moment gains less than the device could lose."""


class Launches:
    """Keeps the batches that were launched and are not computed, in order. Not thread-safe, without a clock.

    On a CPU, a batch is computed when its launch returns.
    """

    def __init__(self) -> None:
        self._batches: deque[tuple[float, Sequence[PendingCall]]] = deque()
        """Start of the launch, and the calls."""
        self._computed_at = -math.inf
        # Of the last two, because batches differ in size: the shorter step and the longer launch are on the safe side.
        self._steps: deque[float] = deque(maxlen=2)
        self._durations: deque[float] = deque(maxlen=2)

    @property
    def busy(self) -> bool:
        """Whether the device computes."""
        return bool(self._batches)

    @property
    def full(self) -> bool:
        """Whether no further batch may be launched until the oldest one is computed."""
        return len(self._batches) >= _MOST

    def add(self, calls: Sequence[PendingCall], started: float, now: float) -> None:
        """Records a launch that started at `started` and returned `now`, in seconds."""
        self._batches.append((started, calls))
        self._durations.append(now - started)

    def finish(self, now: float) -> tuple[Sequence[PendingCall], float]:
        """Records that the oldest batch is computed; returns its calls and the seconds that it took."""
        started, calls = self._batches.popleft()
        seconds = now - max(started, self._computed_at)
        self._computed_at = now
        self._steps.append(seconds)
        return calls, seconds

    def next_due(self) -> float:
        """Returns the time in seconds from which on a batch may be launched; the past if the device is idle."""
        if not self._batches or not self._steps:
            return -math.inf
        step = min(self._steps)
        lead = max(_LEAD * (step + max(self._durations)), _LEAST_LEAD_SECONDS)
        return max(self._batches[0][0], self._computed_at) + max(0.0, step - lead)
