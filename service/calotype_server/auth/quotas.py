"""Limits per caller: token buckets for rates, and a maximum number of generations at the same time.

A bucket of n per minute holds at most n tokens and gains n tokens per minute, so a caller may use n at once after a
quiet minute. A request that costs more than a full bucket is accepted when the bucket is full and leaves a debt. So no
request is impossible, and the average rate stays within the limit.

Not thread-safe: used only in the event loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype_server.errors import (
    ConcurrentGenerations,
    InvalidRequest,
    PixelStepsPerMinute,
    RequestsPerMinute,
    Violation,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.types import Job

__all__ = ["Bucket", "Quota", "QuotaLimits"]

_MINUTE = 60.0

_ROUNDING_SECONDS = 1e-3

_RUNNING_RETRY_SECONDS = 2.0
"""A guess: the server does not know when one of the caller's generations will end."""


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """Limits of one caller; None for no limit.

    Attributes:
        requests_per_minute: Generations started per minute.
        pixel_steps_per_minute: Sum of width times height times steps of the generations started per minute.
        concurrent: Queued and running generations.
    """

    requests_per_minute: float | None = None
    pixel_steps_per_minute: float | None = None
    concurrent: int | None = None


class Bucket:
    """A token bucket that starts full.

    Args:
        per_minute: Tokens that it gains per minute, and its capacity.
        now: Monotonic time in seconds.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._capacity = per_minute
        self._tokens = per_minute
        self._updated = now

    def wait(self, cost: float, now: float) -> float:
        """Returns the seconds until `cost` tokens may be taken; 0 when they may be taken now."""
        self._tokens = min(self._capacity, self._tokens + (now - self._updated) * self._capacity / _MINUTE)
        self._updated = now
        seconds = (min(cost, self._capacity) - self._tokens) * _MINUTE / self._capacity
        # A caller that waited for as long as we said must not be rejected because of a rounding error.
        return seconds if seconds > _ROUNDING_SECONDS else 0.0

    def take(self, cost: float) -> None:
        """Takes `cost` tokens, which may leave a debt."""
        self._tokens -= cost

    def give_back(self, cost: float) -> None:
        """Returns tokens that were taken for something that did not happen."""
        self._tokens = min(self._capacity, self._tokens + cost)


class Quota:
    """The limits of one caller and how much of them it has used.

    Args:
        limits: Limits of the caller.
        clock: Returns monotonic seconds.
    """

    def __init__(self, limits: QuotaLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        now = clock()
        self._request_bucket = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute, now)
        self._pixel_step_bucket = (
            None if limits.pixel_steps_per_minute is None else Bucket(limits.pixel_steps_per_minute, now)
        )

    def check(self, jobs: Sequence[Job], running: int) -> None:
        """Checks whether the caller may start all of these jobs now, without charging for them.

        Args:
            jobs: The jobs to start.
            running: Number of the caller's queued and running generations.

        Raises:
            InvalidRequest: Several jobs together are more than the limits ever allow at once.
            ConcurrentGenerations: The maximum number of generations is queued or running.
            RequestsPerMinute: The caller started too many generations in the last minute.
            PixelStepsPerMinute: The caller's generations of the last minute used too many pixel steps.
        """
        limits, now = self.limits, self._clock()
        count, cost = len(jobs), sum(map(_pixel_steps, jobs))
        if count > 1:
            _require_possible(limits, count, cost)
        if limits.concurrent is not None and running + count > limits.concurrent:
            raise ConcurrentGenerations(
                f"Your key allows {limits.concurrent} generations at the same time; {running} are queued or running.",
                retry_after=_RUNNING_RETRY_SECONDS,
                metadata={"limit": str(limits.concurrent)},
            )
        if self._request_bucket is not None and (wait := self._request_bucket.wait(count, now)):
            raise RequestsPerMinute(
                f"Your key allows {limits.requests_per_minute:g} generations per minute.",
                retry_after=wait,
                metadata={"limit": f"{limits.requests_per_minute:g}"},
            )
        if self._pixel_step_bucket is not None and (wait := self._pixel_step_bucket.wait(cost, now)):
            raise PixelStepsPerMinute(
                f"Your key allows {limits.pixel_steps_per_minute:.0f} pixels times steps per minute; "
                f"this request needs {cost}.",
                retry_after=wait,
                metadata={"limit": f"{limits.pixel_steps_per_minute:.0f}", "cost": str(cost)},
            )

    def charge(self, jobs: Sequence[Job]) -> None:
        """Charges the caller for jobs that were started."""
        if self._request_bucket is not None:
            self._request_bucket.take(len(jobs))
        if self._pixel_step_bucket is not None:
            self._pixel_step_bucket.take(sum(map(_pixel_steps, jobs)))

    def refund(self, jobs: Sequence[Job]) -> None:
        """Reverses the charge for jobs that the server could not accept after all."""
        if self._request_bucket is not None:
            self._request_bucket.give_back(len(jobs))
        if self._pixel_step_bucket is not None:
            self._pixel_step_bucket.give_back(sum(map(_pixel_steps, jobs)))


def _require_possible(limits: QuotaLimits, count: int, pixel_steps: int) -> None:
    """Raises `InvalidRequest` if a group of jobs exceeds a limit even when nothing else was started.

    A single job is never impossible: it may leave a debt. A group can be split.
    """
    for limit, needed, unit in (
        (limits.concurrent, count, "generations at the same time"),
        (limits.requests_per_minute, count, "generations per minute"),
        (limits.pixel_steps_per_minute, pixel_steps, "pixels times steps per minute"),
    ):
        if limit is not None and needed > limit:
            description = f"is {count}, which needs {needed} {unit}; your key allows {limit:.15g}"
            raise InvalidRequest([Violation("image_count", description)])


def _pixel_steps(job: Job) -> int:
    return job.pixel_count * job.computed_step_count
