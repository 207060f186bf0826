"""Detects generations that hang, and ends the process so that a supervisor restarts it.

A thread that hangs in a driver or a lock can be neither joined nor killed. Before the process ends, health checks fail,
every generation gets a typed end, the log shows where each thread hangs, and the state on disk is closed.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from calotype_server.threads import exit_process, stacks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from calotype_server.generations.generation import Generation
    from calotype_server.types import Job

__all__ = ["EXIT_STALLED", "Stall", "Watchdog", "end_when_stalled"]

_log = structlog.get_logger(__name__)

EXIT_STALLED = 70
"""Exit code when a thread or the disk hangs: EX_SOFTWARE of sysexits.h."""

_USUAL_TIMES = 20
"""A pause of this many usual pauses is suspicious."""

_FIRST_TIMES = 10
"""The first image of a size may take this many times longer: kernels are compiled and selected, memory is allocated."""

_LONGEST_INTERVAL = 5.0
_ORDERLY_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Stall:
    """A generation that made no progress for `seconds`."""

    generation: Generation
    seconds: float


@dataclass(slots=True)
class _Pause:
    """A time without an event of a generation: its number of events so far, and the longest usual wait for others."""

    events: int
    seconds: float = 0.0
    usual_wait: float = 0.0


class Watchdog:
    """Watches running generations. Lives in the event loop.

    Every event of a generation is progress: a step, a preview, a phase. A generation is stalled after
    `watchdog_seconds` without progress, or after 20 of its usual steps if that is longer; ten times later if it is the
    first of its size. A generation that waited for others is not stalled as long as any of them makes steps, up to 20
    times the usual wait, and it has that patience once more when they have ended.

    Args:
        running: Returns the generations that have not ended.
        usual_pause: Returns the usual seconds between two events of a job, or None if unknown.
        watchdog_seconds: Least time without progress that counts as a stall, in seconds, above 0.
        usual_wait: Returns the most seconds for which a generation usually waits for others.
    """

    def __init__(
        self,
        running: Callable[[], Iterable[Generation]],
        usual_pause: Callable[[Job], float | None],
        watchdog_seconds: float,
        usual_wait: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._running = running
        self._usual_wait = usual_wait
        self._usual_pause = usual_pause
        self._watchdog_seconds = watchdog_seconds
        self._pauses: dict[Generation, _Pause] = {}
        self._without_steps = 0.0
        """Seconds in which no generation made a step. The first events of a generation prove nothing: it reports them
        even if the device hangs."""

    @property
    def longest_pause(self) -> float:
        """Longest time without progress of any running generation, in seconds, as of the last check."""
        return max((pause.seconds for pause in self._pauses.values()), default=0.0)

    def check(self, elapsed: float) -> list[Stall]:
        """Returns the stalled generations, after another `elapsed` seconds."""
        before, self._pauses = self._pauses, {}
        self._without_steps += elapsed
        usual_wait = self._usual_wait()
        for generation in self._running():
            if not generation.on_engine:
                continue
            pause = before.get(generation)
            if pause is not None and pause.events == generation.stopwatch.events:
                pause.seconds += elapsed
            else:
                pause = _Pause(generation.stopwatch.events)
                if generation.events.state.step > 0:
                    self._without_steps = 0.0
            # The longest of the pause: when the others have ended, there is nothing to wait for, but also no step yet.
            pause.usual_wait = max(pause.usual_wait, usual_wait)
            self._pauses[generation] = pause
        return [Stall(each, pause.seconds) for each, pause in self._pauses.items() if self._is_stalled(each, pause)]

    def _is_stalled(self, generation: Generation, pause: _Pause) -> bool:
        patience = self._patience(generation)
        if pause.seconds <= patience:
            return False
        return pause.seconds > _USUAL_TIMES * pause.usual_wait or self._without_steps > patience

    async def watch(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> list[Stall]:
        """Waits until a generation is stalled, and returns all stalled ones.

        Args:
            clock: A monotonic clock, in seconds.
            sleep: Sleeps for a number of seconds.
        """
        interval = min(self._watchdog_seconds / 4, _LONGEST_INTERVAL)
        before = clock()
        while True:
            await sleep(interval)
            now = clock()
            # If this task itself is late, the process was stopped or starved; that is not a stall.
            if stalls := self.check(min(now - before, 2 * interval)):
                return stalls
            before = now

    def _patience(self, generation: Generation) -> float:
        usual = self._usual_pause(generation.job) or 0.0
        patience = max(self._watchdog_seconds, _USUAL_TIMES * usual)
        return patience * _FIRST_TIMES if generation.first_of_its_size else patience


async def end_when_stalled(
    watchdog: Watchdog,
    end_orderly: Callable[[Sequence[Stall]], Awaitable[None]],
    exit_process: Callable[[int], object] = exit_process,
) -> None:
    """Ends the process when a generation is stalled.

    Args:
        watchdog: Detects stalls.
        end_orderly: Ends all generations and delivers their ends; it has 10 seconds.
        exit_process: Ends the process without joining threads.
    """
    stalls = await watchdog.watch()
    for stall in stalls:
        generation = stall.generation
        phase, step = generation.events.state.phase, generation.events.state.step
        _log.error(
            "generation stalled", generation=generation.id, phase=phase.name, step=step, seconds=round(stall.seconds, 1)
        )
    _log.error("the process exits; a supervisor should restart it", code=EXIT_STALLED, stacks=stacks())

    async def end() -> None:
        try:
            await end_orderly(stalls)
        except BaseException:
            _log.exception("the orderly end failed")

    try:
        # Not `wait_for`, which waits until a task that it cancels has ended.
        await asyncio.wait({asyncio.ensure_future(end())}, timeout=_ORDERLY_END_SECONDS)
    finally:
        exit_process(EXIT_STALLED)
