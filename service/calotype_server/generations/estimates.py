"""Estimates how long generations take, from measured steps and from how many run at once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.types import Job, Timings

__all__ = ["StepTimeEstimator", "Work", "finish_times"]

_NEWEST_WEIGHT = 0.2
"""Weight of the newest measurement in the moving averages: a busy minute loses its effect after a few generations."""

_LOWERED = 0.9
"""Factor by which `StepTimeEstimator.lower` reduces the estimates."""


class StepTimeEstimator:
    """Moving averages of the seconds per step, by number of running generations, and of the time around the steps.

    Both are per pixel: the work of convolutions grows linearly with the number of pixels, that of attention a little
    faster.
    """

    def __init__(self) -> None:
        self._step: dict[int, float] = {}
        self._around: float | None = None

    def observe_step(self, job: Job, seconds: float, active: int) -> None:
        """Learns from a step that took `seconds` while `active` generations ran, its own included."""
        mixed = _mix(self._step.get(active), seconds / job.pixel_count)
        # Replaced instead of modified: generation threads write while the event loop reads.
        self._step = {**self._step, active: mixed}

    def observe_end(self, job: Job, timings: Timings) -> None:
        """Learns from a generation that completed all phases."""
        if timings.encoding_prompt is not None and timings.decoding is not None:
            self._around = _mix(self._around, (timings.encoding_prompt + timings.decoding) / job.pixel_count)

    def lower(self) -> None:
        """Lowers the estimates by 10 %. Work that is rejected because of them cannot correct them otherwise."""
        self._step = {active: seconds * _LOWERED for active, seconds in self._step.items()}
        if self._around is not None:
            self._around *= _LOWERED

    def forget(self) -> None:
        """Discards all measurements."""
        self._step = {}
        self._around = None

    def step_seconds(self, job: Job, active: int = 1) -> float | None:
        """Seconds per step of `job` while `active` generations run; None before the first measurement."""
        known = self._step
        if not known:
            return None
        nearest = min(known, key=lambda count: (abs(count - active), -count))
        # An unmeasured number is assumed to share the device evenly. Batching does better, and is measured soon.
        return known[nearest] * job.pixel_count * active / nearest

    def usual_pause(self, job: Job, active: int = 1) -> float | None:
        """Usual seconds between two events of `job`: a step, or the work before or after the steps."""
        step = self.step_seconds(job, active)
        return step if step is None or self._around is None else max(step, self._around * job.pixel_count)

    def total_seconds(self, job: Job, active: int = 1) -> float | None:
        """Seconds from leaving the queue to the final image."""
        return self.remaining_seconds(job, 0, job.step_count, active)

    def remaining_seconds(self, job: Job, step: int, total_steps: int, active: int = 1) -> float | None:
        """Seconds to the final image after `step` of `total_steps` steps."""
        step_seconds = self.step_seconds(job, active)
        if step_seconds is None or self._around is None:
            return None
        around = (self._around if step == 0 else self._around / 2) * job.pixel_count
        return step_seconds * job.step_count * (total_steps - step) / total_steps + around


@dataclass(slots=True)
class Work:
    """A running job and the share of its work that is left, 0 to 1."""

    job: Job
    left: float = 1.0


def finish_times(
    estimator: StepTimeEstimator, running: Sequence[Work], waiting: Sequence[Job], slots: int
) -> list[float] | None:
    """Simulates the queue: when does each waiting job finish if no other job arrives?

    All running jobs progress together at the speed measured for their number. Waiting jobs start in order when a slot
    becomes free.

    Args:
        estimator: The measured durations.
        running: Running jobs.
        waiting: Waiting jobs, the next one first.
        slots: Number of jobs that run at once.

    Returns:
        Seconds from now to the final image of each waiting job; None before the first measurement.
    """
    if waiting and estimator.total_seconds(waiting[0]) is None:
        return None
    pending = deque(_Place(job, 1.0, index) for index, job in enumerate(waiting))
    active = [_Place(work.job, work.left, None) for work in running]
    times = [0.0] * len(waiting)
    now, unfinished = 0.0, len(waiting)
    while unfinished:
        while pending and len(active) < slots:
            active.append(pending.popleft())
        durations = [estimator.total_seconds(place.job, len(active)) or 0.0 for place in active]
        lefts = [place.left * duration for place, duration in zip(active, durations, strict=True)]
        passed = min(lefts)
        now += passed
        for place, duration in zip(active, durations, strict=True):
            place.left -= passed / duration if duration else place.left
        ended = active.pop(lefts.index(passed))
        if ended.index is not None:
            times[ended.index] = now
            unfinished -= 1
    return times


@dataclass(slots=True)
class _Place:
    job: Job
    left: float
    index: int | None
    """Index in the queue; None for a job that already runs."""


def _mix(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST_WEIGHT * (new - old)
