"""How long generations will take, from how long earlier ones took and from who is at work beside them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.types import Job, Timings

__all__ = ["StepTimeEstimator", "Work", "finish_times"]

_NEWEST_WEIGHT = 0.2
"""Weight of the newest observation in the moving averages: a busy minute is forgotten after a few generations."""

_DOUBT = 0.9


class StepTimeEstimator:
    """Moving averages of seconds per step, for each number of generations at work, and of the time around the steps.

    Both are per pixel: work grows about linearly with the number of pixels, exactly so in convolutions, a little faster
    in attention.
    """

    def __init__(self) -> None:
        self._step: dict[int, float] = {}
        self._around: float | None = None

    def observe_step(self, job: Job, seconds: float, active: int) -> None:
        """Learns from a step that took `seconds` while `active` generations were at work, itself included."""
        mixed = _mix(self._step.get(active), seconds / job.pixel_count)
        # Replaced, not changed: generations' threads write while the event loop reads.
        self._step = {**self._step, active: mixed}

    def observe_end(self, job: Job, timings: Timings) -> None:
        """Learns from a generation that went through all its phases."""
        if timings.encoding_prompt is not None and timings.decoding is not None:
            self._around = _mix(self._around, (timings.encoding_prompt + timings.decoding) / job.pixel_count)

    def doubt(self) -> None:
        """Lowers the estimates a little: work was refused because of them, so nothing else would ever correct them."""
        self._step = {active: seconds * _DOUBT for active, seconds in self._step.items()}
        if self._around is not None:
            self._around *= _DOUBT

    def forget(self) -> None:
        """Starts anew."""
        self._step = {}
        self._around = None

    def step_seconds(self, job: Job, active: int = 1) -> float | None:
        """Seconds of a step of `job` while `active` generations are at work; None when no step was measured yet."""
        known = self._step
        if not known:
            return None
        nearest = min(known, key=lambda count: (abs(count - active), -count))
        # What was not measured is taken to share the device evenly; batching does better, and is seen soon.
        return known[nearest] * job.pixel_count * active / nearest

    def usual_pause(self, job: Job, active: int = 1) -> float | None:
        """Seconds that may pass between two events of `job`: a step, or what comes before the steps or after them."""
        step = self.step_seconds(job, active)
        return step if step is None or self._around is None else max(step, self._around * job.pixel_count)

    def total_seconds(self, job: Job, active: int = 1) -> float | None:
        """Seconds from the start of work to the final image."""
        return self.remaining_seconds(job, 0, job.step_count, active)

    def remaining_seconds(self, job: Job, step: int, total_steps: int, active: int = 1) -> float | None:
        """Seconds to the final image when `step` of `total_steps` are done."""
        step_seconds = self.step_seconds(job, active)
        if step_seconds is None or self._around is None:
            return None
        around = (self._around if step == 0 else self._around / 2) * job.pixel_count
        return step_seconds * job.step_count * (total_steps - step) / total_steps + around


@dataclass(slots=True)
class Work:
    """A job, and the share of its work that is left, 0 to 1."""

    job: Job
    left: float = 1.0


def finish_times(
    pace: StepTimeEstimator, running: Sequence[Work], waiting: Sequence[Job], slots: int
) -> list[float] | None:
    """Plays the future: who finishes when, if nobody else comes.

    All who run progress together, each at the pace of that many; who waits starts in order when a slot is free.

    Args:
        pace: How long things take.
        running: What is at work.
        waiting: What waits, the next first.
        slots: How much is at work at once.

    Returns:
        Seconds from now to the final image of each that waits; None while nothing was measured.
    """
    if waiting and pace.total_seconds(waiting[0]) is None:
        return None
    pending = deque(_Place(job, 1.0, index) for index, job in enumerate(waiting))
    active = [_Place(work.job, work.left, None) for work in running]
    times = [0.0] * len(waiting)
    now, unfinished = 0.0, len(waiting)
    while unfinished:
        while pending and len(active) < slots:
            active.append(pending.popleft())
        durations = [pace.total_seconds(place.job, len(active)) or 0.0 for place in active]
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
    """In the queue; None for who runs already."""


def _mix(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST_WEIGHT * (new - old)
