"""Estimates of remaining time, measured per number of running generations and simulated along the queue."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.generations.estimates import StepTimeEstimator, Work, finish_times
from calotype_server.types import DeliveryOptions, Job, Speed, Timings
from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

JOB = Job("a cat", None, 64, 64, 10, 3.0, 0, "DDIMScheduler")


def measured(steps: dict[int, float], overhead: float = 2.0) -> StepTimeEstimator:
    """Returns an estimator that has observed steps, by number of running generations, and one end."""
    estimator = StepTimeEstimator()
    for active, seconds in steps.items():
        estimator.observe_step(JOB, seconds, active)
    estimator.observe_end(JOB, Timings(encoding_prompt=overhead / 2, decoding=overhead / 2))
    return estimator


def test_there_is_no_estimate_without_measurements() -> None:
    """Steps alone, or prompt encoding and decoding alone, are not enough."""
    estimator = StepTimeEstimator()
    assert estimator.total_seconds(JOB) is None
    estimator.observe_step(JOB, 1.0, 1)
    assert estimator.total_seconds(JOB) is None
    assert finish_times(estimator, [], [Work(JOB)], 1) is None


def test_estimates_follow_new_steps_and_ignore_unfinished_generations() -> None:
    """A new step changes the estimate; the timings of a generation that did not decode are not used."""
    estimator = measured({1: 1.0})
    assert estimator.total_seconds(JOB) == pytest.approx(12.0)
    estimator.observe_end(JOB, Timings(encoding_prompt=100.0))
    assert estimator.total_seconds(JOB) == pytest.approx(12.0)
    estimator.observe_step(JOB, 2.0, 1)
    assert 12.0 < estimator.total_seconds(JOB) < 22.0
    assert estimator.remaining_seconds(JOB, 10, 10) == pytest.approx(1.0)


def test_a_fast_job_takes_the_time_of_its_computed_steps() -> None:
    """Of 28 steps at speed FAST 14 take time, in the estimate of a job and in the simulation of the queue."""
    estimator = measured({1: 1.0})
    fast = replace(JOB, step_count=28, speed=Speed.FAST)
    assert estimator.total_seconds(fast) == pytest.approx(14 + 2)
    assert finish_times(estimator, [Work(fast, 0.5)], [Work(fast)], 1) == pytest.approx([8 + 16])


@pytest.mark.parametrize(("speed", "learned"), [(Speed.EXACT, 28), (Speed.FAST, 14)])
async def test_only_computed_steps_are_learned(monkeypatch: pytest.MonkeyPatch, speed: Speed, learned: int) -> None:
    """The server learns the duration of a step once per computed step, so forecast steps do not lower it."""
    job = replace(JOB, step_count=28, speed=speed)
    async with running_runtime(FakeEngine()) as runtime:
        seen: list[Job] = []
        monkeypatch.setattr(StepTimeEstimator, "observe_step", lambda _, job, *__: seen.append(job))
        async with runtime.generations.start(job, DeliveryOptions()) as reader:
            async for _ in reader:
                pass
    assert seen == [job] * learned


def test_concurrency_without_measurements_is_assumed_to_share_evenly() -> None:
    """With 3 generations measured, 4 are assumed to be 4/3 as slow as 3, not 4 times as slow as 1."""
    estimator = measured({1: 1.0, 3: 1.5})
    assert estimator.step_seconds(JOB, 3) == pytest.approx(1.5)
    assert estimator.step_seconds(JOB, 4) == pytest.approx(2.0)
    assert estimator.step_seconds(replace(JOB, width=128), 1) == pytest.approx(2.0)


def test_times_add_up_along_the_queue_with_one_slot() -> None:
    """Half of the running generation, then 24 s for twice the pixels, then 12 s."""
    times = finish_times(measured({1: 1.0}), [Work(JOB, 0.5)], [Work(replace(JOB, width=128)), Work(JOB)], slots=1)
    assert times == pytest.approx([6.0 + 24.0, 6.0 + 24.0 + 12.0])


def test_two_slots_use_the_step_time_of_two_generations() -> None:
    """Two generations take 1.5 s per step, 17 s each; then the third runs alone at 1 s per step."""
    times = finish_times(measured({1: 1.0, 2: 1.5}), [], [Work(JOB)] * 3, slots=2)
    assert times == pytest.approx([17.0, 17.0, 29.0])


@given(
    st.lists(st.floats(0.01, 1.0), max_size=4),
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_finish_times_are_finite_and_in_order(fractions: list[float], steps: list[int], slots: int) -> None:
    """Every generation finishes, not earlier than it would alone; with one slot, they finish in order."""
    estimator = measured({1: 1.0, 2: 1.2, 4: 2.0})
    waiting = [replace(JOB, step_count=count) for count in steps]
    running = [Work(JOB, fraction) for fraction in fractions[:slots]]
    times = finish_times(estimator, running, [Work(job) for job in waiting], slots)
    for job, seconds in zip(waiting, times, strict=True):
        assert seconds >= estimator.total_seconds(job) * (1 - 1e-9)
    if slots == 1:
        assert times == sorted(times)


@given(
    paces=st.dictionaries(st.integers(1, 9), st.floats(0.01, 10.0), min_size=1, max_size=5),
    lefts=st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(1, 4), st.integers(1, 30)), max_size=6),
    jobs=st.lists(st.tuples(st.floats(0.01, 1.0), st.integers(1, 4), st.integers(1, 30)), max_size=12),
    slots=st.integers(1, 8),
)
def test_the_simulation_in_linear_time_equals_the_simple_one(
    paces: dict[int, float], lefts: list[tuple[float, int, int]], jobs: list[tuple[float, int, int]], slots: int
) -> None:
    """The times equal those of a simulation that recomputes every running job at every event."""
    estimator = measured(paces)
    running = [Work(replace(JOB, width=64 * width, step_count=steps), left) for left, width, steps in lefts[:slots]]
    waiting = [Work(replace(JOB, width=64 * width, step_count=steps), left) for left, width, steps in jobs]
    expected = simple_finish_times(estimator, running, waiting, slots)
    assert finish_times(estimator, running, waiting, slots) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(st.sets(st.integers(1, 20), min_size=1, max_size=6))
def test_the_table_of_paces_equals_single_estimates(measured_counts: set[int]) -> None:
    """For every number of running generations, the table has the time of `step_seconds`."""
    estimator = measured({count: 0.1 * count**1.5 for count in measured_counts})
    paces = estimator.paces(25)
    for active in range(1, 26):
        assert paces[active].step * JOB.pixel_count == pytest.approx(estimator.step_seconds(JOB, active))


def test_the_work_of_an_estimate_grows_linearly() -> None:
    """Twice as many jobs, of two different lengths, cost at most 2.3 times as many looks at a job."""

    def looks(slots: int, queued: int) -> int:
        counted = 0

        class Counted(Job):
            __slots__ = ()

            @property
            def pixel_count(self) -> int:
                nonlocal counted
                counted += 1
                return self.width * self.height

        jobs = [Counted("a", None, 64, 64, 10 + 10 * (n % 2), 3.0, 0, "DDIMScheduler") for n in range(slots + queued)]
        finish_times(
            measured(dict.fromkeys(range(1, slots), 1.0)),
            [Work(job, 0.5) for job in jobs[:slots]],
            [Work(job) for job in jobs[slots:]],
            slots,
        )
        return counted

    assert looks(128, 512) <= 2.3 * looks(64, 256)
    assert looks(64, 256) <= 3 * (64 + 256)


@dataclass
class Place:
    """A running job in the simple simulation."""

    job: Job
    left: float
    index: int | None


def simple_finish_times(
    estimator: StepTimeEstimator, running: Sequence[Work], waiting: Sequence[Work], slots: int
) -> list[float]:
    """The definition of `finish_times`, in quadratic time."""
    pending = deque(Place(work.job, work.left, index) for index, work in enumerate(waiting))
    active = [Place(work.job, work.left, None) for work in running]
    times = [0.0] * len(waiting)
    now, unfinished = 0.0, len(waiting)
    while unfinished:
        while pending and len(active) < slots:
            active.append(pending.popleft())
        durations = [estimator.total_seconds(place.job, len(active)) for place in active]
        lefts = [place.left * duration for place, duration in zip(active, durations, strict=True)]
        passed = min(lefts)
        now += passed
        for place, duration in zip(active, durations, strict=True):
            place.left -= passed / duration
        ended = active.pop(lefts.index(passed))
        if ended.index is not None:
            times[ended.index] = now
            unfinished -= 1
    return times
