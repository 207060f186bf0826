"""Notices work that has stopped for good, and ends the process, so that a supervisor starts a new one.

A thread that hangs in a driver or a lock can be neither joined nor killed. What can be done is done first: health
checks fail, everybody gets a typed end, the log says where each thread stands, and what is kept on disk is closed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from calotype_server.generations.generation import Generation
    from calotype_server.types import Job

__all__ = ["EXIT_STALLED", "Stall", "Watchdog", "end_when_stalled", "stacks"]

_log = structlog.get_logger(__name__)

EXIT_STALLED = 70
"""Exit code: EX_SOFTWARE of sysexits.h."""

_USUAL_TIMES = 20
"""A pause is suspicious from so many times the usual one."""

_FIRST_TIMES = 10
"""So much longer may the first picture of a size take: kernels are compiled and chosen, memory is found."""

_THREADS = "calotype-"
_LONGEST_INTERVAL = 5.0
_FAREWELL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Stall:
    """A generation that made no progress for `seconds`."""

    generation: Generation
    seconds: float


class Watchdog:
    """Watches generations at work; lives in the event loop.

    Any event of a generation is progress: a step, a preview, a phase. One without is stalled after the longest of
    `watchdog_seconds` and twenty of its usual steps; ten times later when it is the first of its size.

    Args:
        running: Returns the generations that have not ended.
        usual_pause: Returns the seconds that usually pass between two events of such a job, or None.
        watchdog_seconds: Least time without progress that counts, above 0.
    """

    def __init__(
        self,
        running: Callable[[], Iterable[Generation]],
        usual_pause: Callable[[Job], float | None],
        watchdog_seconds: float,
    ) -> None:
        self._running = running
        self._usual_pause = usual_pause
        self._watchdog_seconds = watchdog_seconds
        self._pauses: dict[Generation, tuple[int, float]] = {}
        """Events so far, and seconds since the last."""

    @property
    def longest_pause(self) -> float:
        """Seconds since the last progress of whoever waits for longest, as of the last check."""
        return max((seconds for _, seconds in self._pauses.values()), default=0.0)

    def check(self, elapsed: float) -> list[Stall]:
        """Returns what is stalled, after another `elapsed` seconds."""
        before, self._pauses = self._pauses, {}
        stalls = []
        for generation in self._running():
            if not generation.working:
                continue
            events, seconds = before.get(generation, (-1, 0.0))
            seconds = seconds + elapsed if events == generation.watch.events else 0.0
            self._pauses[generation] = generation.watch.events, seconds
            if seconds > self._patience(generation):
                stalls.append(Stall(generation, seconds))
        return stalls

    async def watch(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> list[Stall]:
        """Returns as soon as something is stalled.

        Args:
            clock: Seconds that only rise.
            sleep: Waits for so many seconds.
        """
        interval = min(self._watchdog_seconds / 4, _LONGEST_INTERVAL)
        before = clock()
        while True:
            await sleep(interval)
            now = clock()
            # When this very task comes late, the process was stopped, or starved; that is nobody's stall.
            if stalls := self.check(min(now - before, 2 * interval)):
                return stalls
            before = now

    def _patience(self, generation: Generation) -> float:
        usual = self._usual_pause(generation.job) or 0.0
        patience = max(self._watchdog_seconds, _USUAL_TIMES * usual)
        return patience * _FIRST_TIMES if generation.first_of_its_size else patience


async def end_when_stalled(
    watchdog: Watchdog,
    farewell: Callable[[Sequence[Stall]], Awaitable[None]],
    leave: Callable[[int], object] = os._exit,
) -> None:
    """Ends the process when something is stalled, and nothing happens otherwise.

    Args:
        watchdog: Tells.
        farewell: Does what can still be done; it has ten seconds.
        leave: Ends the process without joining threads.
    """
    stalls = await watchdog.watch()
    for stall in stalls:
        generation = stall.generation
        phase, step = generation.log.state.phase, generation.log.state.step
        _log.error("stalled", generation=generation.id, phase=phase.name, step=step, seconds=round(stall.seconds, 1))
    _log.error("ending the process, which a supervisor should start anew", code=EXIT_STALLED, stacks=stacks())
    try:
        await asyncio.wait_for(farewell(stalls), _FAREWELL_SECONDS)
    except Exception:
        _log.exception("not everything could be ended in order")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        leave(EXIT_STALLED)


def stacks() -> dict[str, list[str]]:
    """Returns where our threads stand, the innermost call last: files, lines and functions, and no values."""
    names = {thread.ident: thread.name for thread in threading.enumerate() if thread.name.startswith(_THREADS)}
    return {
        names[ident]: [f"{each.filename}:{each.lineno} {each.name}" for each in traceback.extract_stack(frame)]
        for ident, frame in sys._current_frames().items()
        if ident in names
    }
