"""How much one caller may start: token buckets, and a bound on what runs at once.

A bucket of n per minute holds n at most and gains n a minute, so that n may come at once after a quiet minute. What
costs more than the bucket holds is let in when it is full and leaves a debt: nothing is impossible, and the rate holds
in the mean.

Lives in the event loop; nothing here is thread-safe, and nothing needs to be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype_server.errors import ConcurrentGenerations, PixelStepsPerMinute, RequestsPerMinute

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import Job

__all__ = ["Bucket", "Quota", "QuotaLimits"]

_MINUTE = 60.0

_NOTHING_SECONDS = 1e-3

_RUNNING_RETRY_SECONDS = 2.0
"""Until one of the caller's own generations may have ended; nobody knows when."""


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """What a caller may start; None for no limit.

    Attributes:
        requests_per_minute: Generations begun.
        pixel_steps_per_minute: Width times height times steps, summed over them.
        concurrent: Generations that wait or run at once.
    """

    requests_per_minute: float | None = None
    pixel_steps_per_minute: float | None = None
    concurrent: int | None = None


class Bucket:
    """A token bucket that is full at first.

    Args:
        per_minute: What it gains in a minute, and holds at most.
        now: Seconds on a clock that never goes back.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._capacity = per_minute
        self._tokens = per_minute
        self._at = now

    def wait(self, cost: float, now: float) -> float:
        """Returns the seconds until `cost` may be taken; 0 when it may be now."""
        self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._capacity / _MINUTE)
        self._at = now
        seconds = (min(cost, self._capacity) - self._tokens) * _MINUTE / self._capacity
        # Whoever has waited as long as told is not refused for a rounding error.
        return seconds if seconds > _NOTHING_SECONDS else 0.0

    def take(self, cost: float) -> None:
        """Takes `cost`, which may leave a debt."""
        self._tokens -= cost


class Quota:
    """What one caller has used of its limits.

    Args:
        limits: What it may use.
        clock: Seconds that never go back.
    """

    def __init__(self, limits: QuotaLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        now = clock()
        self._requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute, now)
        self._work = None if limits.pixel_steps_per_minute is None else Bucket(limits.pixel_steps_per_minute, now)

    def check(self, job: Job, running: int) -> None:
        """Raises when a job may not be started now; takes nothing.

        Args:
            job: What is to be started.
            running: The caller's generations that wait or run.

        Raises:
            ConcurrentGenerations: As many wait or run as may.
            RequestsPerMinute: There were too many in the last minute.
            PixelStepsPerMinute: They were too large.
        """
        limits, now = self.limits, self._clock()
        if limits.concurrent is not None and running >= limits.concurrent:
            raise ConcurrentGenerations(
                f"Your key allows {limits.concurrent} generations at once, and {running} wait or run.",
                retry_after=_RUNNING_RETRY_SECONDS,
                metadata={"limit": str(limits.concurrent)},
            )
        if self._requests is not None and (wait := self._requests.wait(1, now)):
            raise RequestsPerMinute(
                f"Your key allows {limits.requests_per_minute:g} generations a minute.",
                retry_after=wait,
                metadata={"limit": f"{limits.requests_per_minute:g}"},
            )
        if self._work is not None and (wait := self._work.wait(_cost(job), now)):
            raise PixelStepsPerMinute(
                f"Your key allows {limits.pixel_steps_per_minute:.0f} pixels times steps a minute; "
                f"this picture takes {_cost(job)}.",
                retry_after=wait,
                metadata={"limit": f"{limits.pixel_steps_per_minute:.0f}", "cost": str(_cost(job))},
            )

    def charge(self, job: Job) -> None:
        """Counts a job that was started."""
        if self._requests is not None:
            self._requests.take(1)
        if self._work is not None:
            self._work.take(_cost(job))


def _cost(job: Job) -> int:
    return job.pixel_count * job.step_count
