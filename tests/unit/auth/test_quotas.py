"""Limits of one caller."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.auth.quotas import Bucket, Quota, QuotaLimits
from calotype_server.errors import (
    ConcurrentGenerations,
    InvalidRequest,
    PixelStepsPerMinute,
    RequestsPerMinute,
    ServiceError,
)
from calotype_server.types import Job

JOB = Job("a cat", None, 64, 64, 10, 3.0, 0, "DDIMScheduler")
COST = 64 * 64 * 10


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(0.5, 1000),
    st.lists(st.tuples(st.floats(0, 90), st.floats(0.1, 3000)), max_size=60),
)
def test_a_bucket_never_gives_more_than_its_rate(per_minute: float, requests: list[tuple[float, float]]) -> None:
    """In any span, at most a full bucket, rate times span, and the debt of the last request are taken."""
    bucket, now = Bucket(per_minute, 0.0), 0.0
    taken: list[tuple[float, float]] = []
    for pause, cost in requests:
        now += pause
        if bucket.wait(cost, now) == 0:
            bucket.take(cost)
            taken.append((now, cost))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            span = taken[last][0] - taken[first][0]
            amount = sum(cost for _, cost in taken[first:last])
            assert amount <= per_minute + span * per_minute / 60 + 1e-4 * per_minute


@given(st.floats(0.5, 1000), st.lists(st.floats(0.1, 3000), min_size=1, max_size=20))
def test_the_returned_wait_is_exact(per_minute: float, costs: list[float]) -> None:
    """A request is accepted after the returned wait and not 1% earlier, even if it costs more than a full bucket."""
    bucket, now = Bucket(per_minute, 0.0), 0.0
    for cost in costs:
        wait = bucket.wait(cost, now)
        if wait > 0.2:
            assert bucket.wait(cost, now + wait * 0.99) > 0
        now += wait
        assert bucket.wait(cost, now) == 0
        bucket.take(cost)


@pytest.mark.parametrize(
    ("limits", "error", "wait"),
    [
        (QuotaLimits(requests_per_minute=2), RequestsPerMinute, 30.0),
        (QuotaLimits(pixel_steps_per_minute=2 * COST), PixelStepsPerMinute, 30.0),
        (QuotaLimits(concurrent=2), ConcurrentGenerations, 2.0),
    ],
)
def test_each_limit_rejects_by_name_and_recovers(limits: QuotaLimits, error: type[ServiceError], wait: float) -> None:
    """Two generations are accepted; the third is rejected with a retry delay, and accepted after that delay."""
    clock = Clock()
    quota = Quota(limits, clock)
    for running in range(2):
        quota.check([JOB], running)
        quota.charge([JOB])
    with pytest.raises(error) as caught:
        quota.check([JOB], 2)
    assert caught.value.retry_after == pytest.approx(wait)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    clock.now += wait
    quota.check([JOB], 1)


def test_a_job_larger_than_the_bucket_leaves_a_debt() -> None:
    """A job worth three minutes starts at once if the bucket is full, and the next job waits for three minutes."""
    clock = Clock()
    quota = Quota(QuotaLimits(pixel_steps_per_minute=COST / 3), clock)
    quota.check([JOB], 0)
    quota.charge([JOB])
    with pytest.raises(PixelStepsPerMinute) as caught:
        quota.check([JOB], 0)
    assert caught.value.retry_after == pytest.approx(180)


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        (QuotaLimits(requests_per_minute=3), RequestsPerMinute),
        (QuotaLimits(pixel_steps_per_minute=3 * COST), PixelStepsPerMinute),
        (QuotaLimits(concurrent=3), ConcurrentGenerations),
    ],
)
def test_a_group_of_jobs_counts_together(limits: QuotaLimits, error: type[ServiceError]) -> None:
    """After one job, three at once exceed the limit for now, and two are accepted. Four at once are never accepted."""
    quota = Quota(limits, Clock())
    quota.charge([JOB])
    with pytest.raises(error) as caught:
        quota.check([JOB] * 3, 1)
    assert caught.value.retry_after
    quota.check([JOB] * 2, 1)
    with pytest.raises(InvalidRequest, match="image_count: is 4") as never:
        quota.check([JOB] * 4, 0)
    assert never.value.retry_after is None


def test_a_refund_reverses_a_charge() -> None:
    """A job that the server could not accept does not count, and a refund never exceeds a full bucket."""
    quota = Quota(QuotaLimits(requests_per_minute=2, pixel_steps_per_minute=2 * COST), Clock())
    quota.charge([JOB] * 2)
    quota.refund([JOB] * 2)
    quota.refund([JOB] * 2)
    quota.check([JOB] * 2, 0)
    quota.charge([JOB] * 2)
    with pytest.raises(RequestsPerMinute):
        quota.check([JOB], 0)


def test_a_check_charges_nothing() -> None:
    """A request that is rejected elsewhere, for example by a full queue, does not count."""
    quota = Quota(QuotaLimits(requests_per_minute=1), Clock())
    quota.check([JOB], 0)
    quota.check([JOB], 0)
    quota.charge([JOB])
    with pytest.raises(RequestsPerMinute):
        quota.check([JOB], 0)
