"""The leak gate reports growth, and only growth."""

from __future__ import annotations

import os
import random
import threading

import pytest

from support.faults.leaks import Footprint, LeakGate, trend

COUNTS = range(0, 4000, 10)
WANDERING = [0, 20_000, 33_000, 26_000, 25_000, 52_000, 26_000, 51_000, 55_000, 51_000, 48_000, 51_000]
"""Memory of a server without a leak in KiB above its least value, as measured every 50 requests."""


def noise(scale: float):
    """Returns a function that returns noise around 0."""
    chance = random.Random(1)
    return lambda: chance.gauss(0, scale)


def test_a_steady_series_has_no_trend() -> None:
    """Noise alone does not count, even if single values are far off."""
    add, chance = noise(500), random.Random(2)
    series = [(count, 300_000 + add() + (50_000 if chance.random() < 0.1 else 0)) for count in COUNTS]
    assert not trend(series).exceeds(4096)


def test_a_leak_is_found_below_the_noise() -> None:
    """10 KiB per request are found although a single value is off by more than the growth of many requests."""
    add = noise(500)
    found = trend([(count, 300_000 + 10 * count + add()) for count in COUNTS])
    assert found.exceeds(4096)
    assert found.per_1000 == pytest.approx(10_000, rel=0.1)


def test_a_pool_that_fills_once_is_no_leak() -> None:
    """A single step, early or late, does not count."""
    for place in (300, 1700):
        add = noise(10)
        assert not trend([(count, 300_000 + add() + 20_000 * (count > place)) for count in COUNTS]).exceeds(4096)


def test_a_shrinking_value_is_no_leak() -> None:
    """Memory that is given back does not count."""
    assert not trend([(count, 300_000 - 10 * count) for count in COUNTS]).exceeds(4096)


@pytest.mark.parametrize(("name", "step"), [("resident_kib", 20), ("threads", 0.05), ("files", 0.05)])
def test_each_value_is_watched(name: str, step: float) -> None:
    """A leak of memory, threads or files is reported under its name."""
    gate = LeakGate(warm_up=100)
    for count in COUNTS:
        values = {"resident_kib": 300_000, "threads": 20, "files": 30}
        values[name] += int(step * count)
        gate.sample(count, Footprint(**values))
    (leak,) = gate.leaks()
    assert leak.startswith(name)


def test_growth_during_the_warm_up_is_ignored() -> None:
    """Samples before the warm-up is over do not count."""
    gate = LeakGate(warm_up=1000)
    for count in COUNTS:
        gate.sample(count, Footprint(300_000 + 100 * min(count, 1000), 20, 30))
    assert gate.leaks() == []
    assert "resident_kib +0.0 (noise 0)" in gate.report()


@pytest.mark.parametrize(("leak", "found"), [(0, 0), (20, 1)])
def test_a_leaked_preview_per_request_shows_above_the_allocator(leak: int, found: int) -> None:
    """20 KiB per request are found although the allocator keeps and returns tens of megabytes."""
    gate = LeakGate(warm_up=400)
    for count in COUNTS:
        held = WANDERING[(count // 50) % len(WANDERING)]
        gate.sample(count, Footprint(716_000 + held + leak * count, 20, 30))
    assert len(gate.leaks()) == found


def test_a_short_run_has_no_trend() -> None:
    """Fewer than ten samples say nothing."""
    gate = LeakGate(warm_up=0)
    gate.sample(1, Footprint(1, 1, 1))
    assert gate.leaks() == []
    assert gate.report().endswith("unknown")


def test_footprints_are_read_from_the_kernel() -> None:
    """An open file and a thread of this process are counted."""
    before = Footprint.of(os.getpid())
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    reading, writing = os.pipe()
    after = Footprint.of(os.getpid())
    os.close(reading)
    os.close(writing)
    done.set()
    thread.join()
    assert (after.files, after.threads) == (before.files + 2, before.threads + 1)
    assert after.resident_kib > 1000
