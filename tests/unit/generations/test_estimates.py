"""How long things will take: learnt from steps, for each number at work, and played forward along the queue."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.generations.estimates import StepTimeEstimator, Work, finish_times
from calotype_server.types import Job, Timings

JOB = Job("a cat", None, 64, 64, 10, 3.0, 0, "DDIMScheduler")


def paced(steps: dict[int, float], around: float = 2.0) -> StepTimeEstimator:
    """A pace that has seen steps with so many at work, and one generation end."""
    pace = StepTimeEstimator()
    for active, seconds in steps.items():
        pace.observe_step(JOB, seconds, active)
    pace.observe_end(JOB, Timings(encoding_prompt=around / 2, decoding=around / 2))
    return pace


def test_nothing_is_estimated_before_it_was_measured() -> None:
    """Steps alone, or the rest alone, are not enough."""
    pace = StepTimeEstimator()
    assert pace.total_seconds(JOB) is None
    pace.observe_step(JOB, 1.0, 1)
    assert pace.total_seconds(JOB) is None
    assert finish_times(pace, [], [JOB], 1) is None


def test_pace_follows_changes_and_ignores_unfinished_work() -> None:
    """The newest step moves the estimate; a generation that did not finish teaches nothing about the rest."""
    pace = paced({1: 1.0})
    assert pace.total_seconds(JOB) == pytest.approx(12.0)
    pace.observe_end(JOB, Timings(encoding_prompt=100.0))
    assert pace.total_seconds(JOB) == pytest.approx(12.0)
    pace.observe_step(JOB, 2.0, 1)
    assert 12.0 < pace.total_seconds(JOB) < 22.0
    assert pace.remaining_seconds(JOB, 10, 10) == pytest.approx(1.0)


def test_company_is_measured_apart_and_otherwise_assumed_to_share_evenly() -> None:
    """Three at work were measured; four are taken to be a third slower than they are, not four times one."""
    pace = paced({1: 1.0, 3: 1.5})
    assert pace.step_seconds(JOB, 3) == pytest.approx(1.5)
    assert pace.step_seconds(JOB, 4) == pytest.approx(2.0)
    assert pace.step_seconds(replace(JOB, width=128), 1) == pytest.approx(2.0)


def test_one_slot_adds_up_along_the_queue() -> None:
    """Half of the first is left, then 24 s of twice the pixels, then 12 s."""
    times = finish_times(paced({1: 1.0}), [Work(JOB, 0.5)], [replace(JOB, width=128), JOB], slots=1)
    assert times == pytest.approx([6.0 + 24.0, 6.0 + 24.0 + 12.0])


def test_two_slots_run_at_the_pace_of_two_until_one_is_left() -> None:
    """Two together take 1.5 s a step: 17 s each; the third starts then, alone at 1 s a step."""
    times = finish_times(paced({1: 1.0, 2: 1.5}), [], [JOB, JOB, JOB], slots=2)
    assert times == pytest.approx([17.0, 17.0, 29.0])


@given(
    st.lists(st.floats(0.01, 1.0), max_size=4),
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_the_future_is_finite_and_in_order(lefts: list[float], steps: list[int], slots: int) -> None:
    """Whatever is at work and waits: everybody finishes, no sooner than alone, and one slot serves in order."""
    pace = paced({1: 1.0, 2: 1.2, 4: 2.0})
    waiting = [replace(JOB, step_count=count) for count in steps]
    times = finish_times(pace, [Work(JOB, left) for left in lefts[:slots]], waiting, slots)
    for job, seconds in zip(waiting, times, strict=True):
        assert seconds >= pace.total_seconds(job) * (1 - 1e-9)
    if slots == 1:
        assert times == sorted(times)
