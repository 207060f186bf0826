"""Ended generations are retained within bounds of time, number and bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from calotype_server.generations.retention import Retention, RetentionLimits


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_items_expire() -> None:
    """An item is there until its time is over, and `expire` returns the seconds until the next one expires."""
    clock, dropped = Clock(), []
    items: Retention[str] = Retention(RetentionLimits(10, 9, 9), on_drop=dropped.append, clock=clock)
    items.add("a", "A", 1)
    clock.now = 4
    items.add("b", "B", 1)
    assert items.expire() == 6
    clock.now = 10
    assert items.get("a") is None
    assert items.get("b") == "B"
    assert dropped == ["A"]


def test_an_item_larger_than_the_limit_is_dropped() -> None:
    """It is dropped at once, together with everything older."""
    items: Retention[str] = Retention(RetentionLimits(10, 9, 5))
    items.add("small", "s", 5)
    items.add("large", "l", 6)
    assert list(items) == []
    assert items.size == 0


@given(
    st.lists(st.tuples(st.integers(0, 6), st.floats(0, 5))),
    st.integers(0, 4),
    st.integers(0, 10),
)
def test_bounds_hold_for_any_sequence(additions: list, count: int, size: int) -> None:
    """There are never too many, too large or too old items; every item is either retained or was dropped once."""
    clock, dropped = Clock(), []
    items: Retention[int] = Retention(RetentionLimits(7, count, size), on_drop=dropped.append, clock=clock)
    sizes, added = [], []
    for number, (bytes_, seconds) in enumerate(additions):
        clock.now += seconds
        items.add(str(number), number, bytes_)
        sizes.append(bytes_)
        added.append(clock.now)
        retained = list(items)
        assert retained == sorted(retained, reverse=True)
        assert len(retained) <= count
        assert items.size == sum(sizes[each] for each in retained) <= size
        assert all(clock.now - added[each] < 7 for each in retained)
        assert sorted([*retained, *dropped]) == list(range(number + 1))


def test_reserved_bytes_displace_the_oldest_items() -> None:
    """Dropped items do not return when the reserved bytes are freed."""
    reserved = [0]
    items: Retention[str] = Retention(RetentionLimits(10, 9, 10), reserved=lambda: reserved[0])
    for name in "abc":
        items.add(name, name, 3)
    reserved[0] = 5
    assert items.get("c") == "c"
    assert list(items) == ["c"]
    reserved[0] = 0
    assert list(items) == ["c"]
