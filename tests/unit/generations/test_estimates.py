"""Estimates of remaining time, measured per number of running generations and simulated along the queue."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.generations.estimates import StepTimeEstimator, Work, finish_times
from calotype_server.types import Job, Timings

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
    assert finish_times(estimator, [], [JOB], 1) is None


def test_estimates_follow_new_steps_and_ignore_unfinished_generations() -> None:
    """A new step changes the estimate; the timings of a generation that did not decode are not used."""
    estimator = measured({1: 1.0})
    assert estimator.total_seconds(JOB) == pytest.approx(12.0)
    estimator.observe_end(JOB, Timings(encoding_prompt=100.0))
    assert estimator.total_seconds(JOB) == pytest.approx(12.0)
    estimator.observe_step(JOB, 2.0, 1)
    assert 12.0 < estimator.total_seconds(JOB) < 22.0
    assert estimator.remaining_seconds(JOB, 10, 10) == pytest.approx(1.0)


def test_concurrency_without_measurements_is_assumed_to_share_evenly() -> None:
    """With 3 generations measured, 4 are assumed to be 4/3 as slow as 3, not 4 times as slow as 1."""
    estimator = measured({1: 1.0, 3: 1.5})
    assert estimator.step_seconds(JOB, 3) == pytest.approx(1.5)
    assert estimator.step_seconds(JOB, 4) == pytest.approx(2.0)
    assert estimator.step_seconds(replace(JOB, width=128), 1) == pytest.approx(2.0)


def test_times_add_up_along_the_queue_with_one_slot() -> None:
    """Half of the running generation, then 24 s for twice the pixels, then 12 s."""
    times = finish_times(measured({1: 1.0}), [Work(JOB, 0.5)], [replace(JOB, width=128), JOB], slots=1)
    assert times == pytest.approx([6.0 + 24.0, 6.0 + 24.0 + 12.0])


def test_two_slots_use_the_step_time_of_two_generations() -> None:
    """Two generations take 1.5 s per step, 17 s each; then the third runs alone at 1 s per step."""
    times = finish_times(measured({1: 1.0, 2: 1.5}), [], [JOB, JOB, JOB], slots=2)
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
    times = finish_times(estimator, [Work(JOB, fraction) for fraction in fractions[:slots]], waiting, slots)
    for job, seconds in zip(waiting, times, strict=True):
        assert seconds >= estimator.total_seconds(job) * (1 - 1e-9)
    if slots == 1:
        assert times == sorted(times)
