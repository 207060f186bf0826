"""Estimates how long generations take, from measured steps and from how many run at once."""

from __future__ import annotations

import heapq
import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.types import Job, Timings

__all__ = ["Pace", "StepTimeEstimator", "Turn", "Turns", "Work", "finish_times"]

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

    def paces(self, most: int) -> list[Pace] | None:
        """Returns the speeds at 0 (meaningless), 1, ..., `most` running generations; None before the first measurement.

        They are those of `step_seconds`, in time O(`most` + measurements).
        """
        known, around = self._step, self._around
        if not known or around is None:
            return None
        counts = sorted(known)
        found, nearest = [Pace(math.inf, math.inf)], 0
        for active in range(1, most + 1):
            while nearest + 1 < len(counts) and counts[nearest + 1] - active <= active - counts[nearest]:
                nearest += 1
            found.append(Pace(known[counts[nearest]] * active / counts[nearest], around))
        return found

    def usual_pause(self, job: Job, active: int = 1) -> float | None:
        """Usual seconds between two events of `job`: a step, or the work before or after the steps."""
        step = self.step_seconds(job, active)
        return step if step is None or self._around is None else max(step, self._around * job.pixel_count)

    def total_seconds(self, job: Job, active: int = 1) -> float | None:
        """Seconds from leaving the queue to the final image."""
        return self.remaining_seconds(job, 0, job.computed_step_count, active)

    def remaining_seconds(self, job: Job, step: int, total_steps: int, active: int = 1) -> float | None:
        """Seconds to the final image after `step` of `total_steps` computed steps."""
        step_seconds = self.step_seconds(job, active)
        if step_seconds is None or self._around is None:
            return None
        around = (self._around if step == 0 else self._around / 2) * job.pixel_count
        return step_seconds * job.computed_step_count * (total_steps - step) / total_steps + around


class Turns:
    """Counts the steps of all generations. Thread-safe.

    If only some running generations progress at once, the time between two steps of one includes turns of others.
    Divided by the turns in it, it is the duration of a step.

    Args:
        progressing: Running generations that progress at once; 0 for all.
    """

    def __init__(self, progressing: int) -> None:
        self._progressing = progressing
        self._lock = threading.Lock()
        self._steps = 0

    def join(self) -> Turn:
        """Returns the view of one generation."""
        return Turn(self)

    @property
    def steps(self) -> int:
        """Steps of all generations so far."""
        return self._steps

    def note_step(self) -> int:
        """Counts a step of any generation, and returns the count."""
        with self._lock:
            self._steps += 1
            return self._steps

    def of(self, steps: int) -> int:
        """Returns in how many turns the engine makes so many steps, at least 1."""
        return max(1, math.ceil(steps / self._progressing)) if self._progressing else 1


class Turn:
    """Counts from step to step of one generation."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._before = turns.steps

    def begin(self) -> None:
        """Records that denoising starts."""
        self._before = self._turns.steps

    def note_step(self) -> int:
        """Records a step, and returns the turns since the one before, its own included."""
        before, self._before = self._before, self._turns.note_step()
        return self._turns.of(self._before - before)


@dataclass(slots=True)
class Work:
    """A job and the share of its work that is left, 0 to 1."""

    job: Job
    left: float = 1.0


def finish_times(
    estimator: StepTimeEstimator, running: Sequence[Work], waiting: Sequence[Work], slots: int
) -> list[float] | None:
    """Simulates the queue: when does each waiting job finish if no other job arrives?

    All running jobs progress together at the speed measured for their number. Waiting jobs start in order when a slot
    becomes free. Costs O((running + waiting) log slots), and in addition `slots` times the number of different step
    counts among the last `slots` jobs.

    Args:
        estimator: The measured durations.
        running: Running jobs, at most `slots`.
        waiting: Waiting jobs, the next one first; they may have made some steps.
        slots: Number of jobs that progress at once.

    Returns:
        Seconds from now to the final image of each waiting job; None before the first measurement.
    """
    if not waiting:
        return []
    count = min(slots, len(running) + len(waiting))
    paces = estimator.paces(count)
    if paces is None:
        return None
    times = [0.0] * len(waiting)
    # As long as jobs wait, as many run as there are slots, so their speed and the time of their end do not change.
    joining = count - len(running)
    active = [_Place(work.left * paces[count].seconds(work.job), None, work.job) for work in running]
    for index, work in enumerate(waiting[:joining]):
        active.append(_Place(work.left * paces[count].seconds(work.job), index, work.job))
    heapq.heapify(active)
    now = 0.0
    for index in range(joining, len(waiting)):
        ended = active[0]
        now = ended.end
        if ended.index is not None:
            times[ended.index] = now
        work = waiting[index]
        heapq.heapreplace(active, _Place(now + work.left * paces[count].seconds(work.job), index, work.job))
    _finish_last(active, now, paces, times)
    return times


def _finish_last(active: list[_Place], now: float, paces: Sequence[Pace], times: list[float]) -> None:
    """Simulates jobs that run until all have ended, and writes the times of those that had been waiting.

    The speed changes whenever one ends. Jobs with the same number of steps keep their order then, because the time of
    each is its number of pixels times a factor that they have in common. So only the next of each group is compared.
    """
    count = len(active)
    groups: dict[int, list[tuple[float, int]]] = {}
    for place in sorted(active, reverse=True):
        pixels_left = (place.end - now) / paces[count].seconds_per_pixel(place.job)
        groups.setdefault(place.job.computed_step_count, []).append(
            (pixels_left, -1 if place.index is None else place.index)
        )
    done = dict.fromkeys(groups, 0.0)
    for pace in paces[count:0:-1]:
        factors = {steps: pace.step * steps + pace.around for steps in groups}
        passed, steps = min((factors[steps] * (group[-1][0] - done[steps]), steps) for steps, group in groups.items())
        now += passed
        for each in groups:
            done[each] += passed / factors[each]
        _, index = groups[steps].pop()
        if index >= 0:
            times[index] = now
        if not groups[steps]:
            del groups[steps]


@dataclass(frozen=True, slots=True)
class Pace:
    """Speed at a number of running generations: seconds per pixel for a step, and for the work around the steps."""

    step: float
    around: float

    def seconds(self, job: Job) -> float:
        """Seconds that a job takes."""
        return self.seconds_per_pixel(job) * job.pixel_count

    def seconds_per_pixel(self, job: Job) -> float:
        """Seconds that each pixel of a job takes."""
        return self.step * job.computed_step_count + self.around


@dataclass(order=True, slots=True)
class _Place:
    """A running job in the simulation."""

    end: float
    """Seconds from the start of the simulation."""
    index: int | None = field(compare=False)
    """Index in the queue; None for a job that already runs."""
    job: Job = field(compare=False)


def _mix(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST_WEIGHT * (new - old)
