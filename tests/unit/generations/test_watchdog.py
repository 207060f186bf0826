"""Detection of stalled generations, and the shutdown after it, with simulated time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.generations import watchdog as watchdog_module
from calotype_server.generations.watchdog import EXIT_STALLED, Watchdog, end_when_stalled
from calotype_server.threads import stacks
from calotype_server.types import Job, Phase

JOB = Job("unmistakable", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")
PATIENCE = 100.0


class Work:
    """The attributes of a generation that the watchdog reads; compared by identity, as generations are."""

    def __init__(self, *, on_engine: bool = True, first: bool = False, step: int = 2) -> None:
        self.id = "g"
        self.job = JOB
        self.on_engine = on_engine
        self.first_of_its_size = first
        self.stopwatch = SimpleNamespace(events=0)
        self.events = SimpleNamespace(state=SimpleNamespace(phase=Phase.DENOISING, step=step))

    def progress(self) -> None:
        """Counts an event."""
        self.stopwatch.events += 1


def watchdog_of(*works: Any, usual: float | None = 1.0, wait: float = 0.0) -> Any:
    """Returns a watchdog for these generations."""
    return Watchdog(lambda: works, lambda _: usual, PATIENCE, lambda: wait)


def stalled() -> Any:
    """Returns a watchdog that has found a stall."""
    return SimpleNamespace(watch=lambda: asyncio.sleep(0, [SimpleNamespace(generation=Work(), seconds=101.0)]))


def test_a_generation_with_events_is_never_stalled() -> None:
    """The total duration does not matter."""
    work = Work()
    watchdog = watchdog_of(work)
    for _ in range(50):
        work.progress()
        assert not watchdog.check(PATIENCE - 1)


def test_a_pause_above_the_limit_is_a_stall() -> None:
    """Pauses are measured from the last event, across checks; the longest one is reported."""
    work, other = Work(), Work()
    watchdog = watchdog_of(work, other)
    watchdog.check(0)
    assert not watchdog.check(60)
    other.progress()
    assert not watchdog.check(40)
    assert watchdog.longest_pause == PATIENCE
    [stall] = watchdog.check(1)
    assert stall.generation is work
    assert stall.seconds == 101.0


def test_a_generation_that_waits_for_others_is_not_stalled() -> None:
    """While another one progresses, a generation has 20 times the usual wait."""
    work, other = Work(), Work()
    watchdog = watchdog_of(work, other, wait=30.0)
    watchdog.check(0)
    for _ in range(6):
        other.progress()
        assert not watchdog.check(PATIENCE)
    other.progress()
    [stall] = watchdog.check(1)
    assert stall.generation is work


def test_generations_that_all_pause_are_stalled() -> None:
    """If no generation progresses, the usual wait does not count."""
    watchdog = watchdog_of(Work(), Work(), wait=3000.0)
    watchdog.check(0)
    assert len(watchdog.check(PATIENCE + 1)) == 2


def test_a_generation_makes_its_next_step_after_all_others_have_ended() -> None:
    """The last of several generations, which waited for all others, has the whole patience for its own next step."""
    work: Any = Work()
    other = Work()
    works: list[Any] = [work, other]
    watchdog = Watchdog(lambda: works, lambda _: 1.0, PATIENCE, lambda: 30.0 if len(works) > 1 else 0.0)
    watchdog.check(0)
    for _ in range(5):
        other.progress()
        assert not watchdog.check(PATIENCE)
    works.remove(other)
    assert not watchdog.check(PATIENCE)
    [stall] = watchdog.check(1)
    assert stall.generation is work


def test_new_generations_do_not_hide_a_device_that_hangs() -> None:
    """Generations that start, but make no step, are no sign of progress."""
    work: Any = Work()
    works: list[Any] = [work]
    watchdog = Watchdog(lambda: works, lambda _: 1.0, PATIENCE, lambda: 3000.0)
    watchdog.check(0)
    works[1:] = [Work(step=0)]
    assert not watchdog.check(PATIENCE)
    works[1:] = [Work(step=0)]
    [stall] = watchdog.check(1)
    assert stall.generation is work


def test_a_generation_that_is_not_on_the_engine_cannot_stall() -> None:
    """A generation may stay in the queue, or wait for the disk, without limit."""
    work = Work(on_engine=False)
    watchdog = watchdog_of(work)
    for _ in range(5):
        assert not watchdog.check(PATIENCE)
    work.on_engine = True
    assert not watchdog.check(PATIENCE)
    assert not watchdog.check(PATIENCE)
    assert watchdog.check(1)


def test_slow_models_have_a_longer_limit() -> None:
    """The limit is 20 typical steps if that is longer."""
    watchdog = watchdog_of(Work(), usual=60.0)
    watchdog.check(0)
    assert not watchdog.check(20 * 60)
    assert watchdog.check(1)


def test_the_first_generation_of_a_size_has_ten_times_the_limit() -> None:
    """Kernels may have to be compiled for it. This also applies before any step was measured."""
    watchdog = watchdog_of(Work(first=True), usual=None)
    watchdog.check(0)
    assert not watchdog.check(10 * PATIENCE)
    assert watchdog.check(1)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 2 * PATIENCE)), max_size=30))
def test_stalls_match_a_simple_model(checks) -> None:
    """For any sequence of events and checks, a stall is a sum of silent time above the limit."""
    work = Work()
    watchdog, silent = watchdog_of(work), 0.0
    watchdog.check(0)
    for progressed, elapsed in checks:
        if progressed:
            work.progress()
        silent = 0.0 if progressed else silent + elapsed
        assert bool(watchdog.check(elapsed)) == (silent > PATIENCE)


async def test_a_suspended_process_is_not_stalled() -> None:
    """After SIGSTOP and SIGCONT the clock jumps; the watchdog was suspended, too, and counts only a little of it."""
    watchdog, now, naps = watchdog_of(Work()), 0.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        naps.append(seconds)
        now += 10_000 if len(naps) == 2 else seconds

    stalls = await asyncio.wait_for(watchdog.watch(lambda: now, sleep), 20)
    assert stalls[0].seconds <= PATIENCE + 2 * max(naps)
    assert len(naps) > 10


async def test_the_process_exits_after_the_final_messages() -> None:
    """The stacks are logged, the shutdown runs, and the process exits with its code, even if the shutdown fails."""
    done = []

    async def shut_down(stalls) -> None:
        done.append(stalls[0].generation.id)
        raise ValueError("no")

    with structlog.testing.capture_logs() as logged:
        await end_when_stalled(stalled(), shut_down, done.append)
    assert done == ["g", EXIT_STALLED]
    assert (logged[0]["event"], logged[0]["generation"]) == ("generation stalled", "g")
    assert isinstance(logged[1]["stacks"], dict)
    assert "unmistakable" not in str(logged)


async def test_stacks_show_only_our_threads_and_no_values() -> None:
    """Stacks have files, lines and functions of the server's own threads, without values."""
    entered, leave = threading.Event(), threading.Event()

    def stuck_here(prompt: str) -> None:
        entered.set()
        leave.wait(20)

    with ThreadPoolExecutor(1, "calotype-generation") as ours, ThreadPoolExecutor(1, "other") as others:
        ours.submit(stuck_here, "unmistakable")
        assert entered.wait(20)
        others.submit(leave.wait, 20)
        found = stacks()
        leave.set()
    assert "calotype-generation_0" in found
    assert all(name.startswith("calotype-") for name in found)
    assert any(line.endswith(" stuck_here") for line in found["calotype-generation_0"])
    assert "unmistakable" not in str(found)


@pytest.mark.parametrize("failure", [SystemExit, asyncio.CancelledError])
async def test_no_failure_of_the_shutdown_keeps_the_process(failure: type[BaseException]) -> None:
    """The process exits although the shutdown raises an exception of any class."""
    codes: list[int] = []

    async def shut_down(stalls) -> None:
        raise failure

    await end_when_stalled(stalled(), shut_down, codes.append)
    assert codes == [EXIT_STALLED]


async def test_a_shutdown_that_hangs_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a limited time, even if it cannot be cancelled."""
    monkeypatch.setattr(watchdog_module, "_ORDERLY_END_SECONDS", 0.01)
    codes: list[int] = []
    released = asyncio.Event()

    async def shut_down(stalls) -> None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()

    await end_when_stalled(stalled(), shut_down, codes.append)
    assert codes == [EXIT_STALLED]
    released.set()
