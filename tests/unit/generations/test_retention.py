"""What has ended is kept, within bounds of time, number and bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from calotype_server.generations.retention import Retention


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_passes() -> None:
    """Something is there until its time is over, and whoever asks is told when the next one goes."""
    clock, forgotten = Clock(), []
    kept: Retention[str] = Retention(seconds=10, count=9, size=9, clock=clock)
    kept.on_forget = forgotten.append
    kept.add("a", "A", 1)
    clock.now = 4
    kept.add("b", "B", 1)
    assert kept.expire() == 6
    clock.now = 10
    assert kept.get("a") is None
    assert kept.get("b") == "B"
    assert forgotten == ["A"]


def test_what_is_too_large_is_not_kept() -> None:
    """One picture larger than all room is forgotten at once, and so is everything before it."""
    kept: Retention[str] = Retention(seconds=10, count=9, size=5)
    kept.add("small", "s", 5)
    kept.add("large", "l", 6)
    assert list(kept) == []
    assert kept.size == 0


@given(
    st.lists(st.tuples(st.integers(0, 6), st.floats(0, 5))),
    st.integers(0, 4),
    st.integers(0, 10),
)
def test_bounds_hold_whatever_comes(additions: list, count: int, size: int) -> None:
    """Never too many, too large or too old; the youngest first; everything is kept or was told to be forgotten."""
    clock, forgotten = Clock(), []
    kept: Retention[int] = Retention(seconds=7, count=count, size=size, clock=clock)
    kept.on_forget = forgotten.append
    sizes, added = [], []
    for number, (bytes_, seconds) in enumerate(additions):
        clock.now += seconds
        kept.add(str(number), number, bytes_)
        sizes.append(bytes_)
        added.append(clock.now)
        held = list(kept)
        assert held == sorted(held, reverse=True)
        assert len(held) <= count
        assert kept.size == sum(sizes[each] for each in held) <= size
        assert all(clock.now - added[each] < 7 for each in held)
        assert sorted([*held, *forgotten]) == list(range(number + 1))


def test_what_others_need_is_not_there() -> None:
    """The oldest make room as soon as anything is looked at, and come back for nobody."""
    kept, others = Retention[str](seconds=10, count=9, size=10), [0]
    kept.reserved = lambda: others[0]
    for name in "abc":
        kept.add(name, name, 3)
    others[0] = 5
    assert kept.get("c") == "c"
    assert list(kept) == ["c"]
    others[0] = 0
    assert list(kept) == ["c"]
