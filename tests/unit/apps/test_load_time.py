"""Estimates of the time until a server is ready."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from calotype_server.apps.load_time import LoadTime

if TYPE_CHECKING:
    from pathlib import Path


class Clock:
    """Time that passes only when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that starts at 100 s."""
    return Clock()


def estimates(load_time: LoadTime, clock: Clock, *ages: float) -> list[float]:
    """Returns the estimates at these ages of the start, in seconds."""
    start, found = clock.now, []
    for age in ages:
        clock.now = start + age
        found.append(load_time.remaining())
    return found


def test_the_first_start_doubles_its_age(tmp_path: Path, clock: Clock) -> None:
    """Without an earlier start, the estimate is the time since the start, 1 to 30 s."""
    assert estimates(LoadTime(tmp_path, "m", clock), clock, 0, 0.5, 4, 20, 1000) == [1, 1, 4, 20, 30]


def test_later_starts_count_down_from_the_last_one(tmp_path: Path, clock: Clock) -> None:
    """The estimate is the rest of the last start's duration, and grows again when this start takes longer."""
    first = LoadTime(tmp_path, "m", clock)
    clock.now += 25
    first.save().join()
    assert estimates(LoadTime(tmp_path, "m", clock), clock, 0, 10, 24.5, 25, 30, 40) == [25, 15, 1, 1, 5, 15]


def test_each_model_has_its_own_time(tmp_path: Path, clock: Clock) -> None:
    """The time of one model does not affect the estimate for another one in the same cache."""
    slow = LoadTime(tmp_path, "slow", clock)
    clock.now += 60
    slow.save().join()
    assert LoadTime(tmp_path, "../fast", clock).remaining() == 1
    assert LoadTime(tmp_path, "slow", clock).remaining() == 30


@pytest.mark.parametrize("content", [b"", b"x", b"-3", b"nan", b"inf", b"\xff"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, clock: Clock, content: bytes) -> None:
    """A file without a sensible number is ignored."""
    LoadTime(tmp_path, "m", clock).save().join()
    (path,) = (tmp_path / "load_times").iterdir()
    path.write_bytes(content)
    assert LoadTime(tmp_path, "m", clock).remaining() == 1


def test_an_unwritable_cache_is_no_error(tmp_path: Path, clock: Clock) -> None:
    """A cache folder that cannot be written does not affect the server."""
    blocked = tmp_path / "file"
    blocked.touch()
    load_time = LoadTime(blocked, "m", clock)
    load_time.save().join()
    assert load_time.remaining() == 1
