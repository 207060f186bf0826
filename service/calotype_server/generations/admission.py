"""A bounded, fair queue that rejects overload and impossible deadlines at once.

The order is that of start-time fair queueing (Goyal, Vin & Cheng 1996, "Start-time Fair Queuing"): every job is tagged
with the work that its caller queued before it, and the smallest tag is next. So a caller that queues a hundred images
delays another caller's first image by one, and a single caller can use the whole server. INTERACTIVE jobs run before
BATCH jobs. `slots` has the rules for who may take a free slot.

Each caller has a limit of places in the queue, and half of the places are kept for callers that have no other waiting
job. So a caller without waiting jobs finds the queue full only if many other callers wait, not because of one.

Lives in the event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.generations.estimates import Work, finish_times
from calotype_server.generations.slots import QueueTicket, RecentCallers, Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.generations.estimates import StepTimeEstimator
    from calotype_server.types import Job, MemoryModel

__all__ = ["Admission", "QueueTicket"]


_REFRESH_SECONDS = 10.0
"""Longest time between two estimates for waiting jobs. Proxies close a stream without a message for a minute."""


class Admission:
    """A fair queue in front of `max_active` slots.

    Args:
        estimator: Estimates waits, for positions and deadlines.
        max_active: Number of slots: generations that run at once, at least 1.
        max_progressing: Running generations that progress at once, those that started first; 0 for all.
        max_queue: Largest number of waiting generations, at least 0.
        max_queue_per_caller: Largest number of waiting generations of one caller; None for half of `max_queue`, at
            least 1. A number above half of `max_queue` reduces the places that are kept for other callers.
        shared: Whether the server is known to have several callers. Otherwise it keeps a slot for others only while
            there are others.
        memory: Memory that generations need; None to ignore it.
        spare: Pixels of an image of the model's default size, for which memory is kept for other callers.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        estimator: StepTimeEstimator,
        *,
        max_active: int,
        max_progressing: int = 0,
        max_queue: int,
        max_queue_per_caller: int | None = None,
        shared: bool = False,
        memory: MemoryModel | None = None,
        spare: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._estimator = estimator
        self._callers = RecentCallers(always=shared, clock=clock)
        self._slots = Slots(max_active, self._callers, memory, spare)
        self._max_progressing = min(max_progressing or max_active, max_active)
        self._max_queue = max_queue
        self._per_caller = max(1, max_queue // 2) if max_queue_per_caller is None else max_queue_per_caller
        self._contested = max(max_queue - max_queue // 2, min(self._per_caller, max_queue))
        """Number of waiting jobs from which on a caller with a waiting job gets no further place."""
        self._waiting: list[QueueTicket] = []
        self._arrivals = itertools.count()
        self._virtual_time = 0.0
        self._tags: dict[str, float] = {}
        """Least tag of a caller's next job, for callers that are ahead of the virtual time."""
        self._report: asyncio.Handle | None = None
        self._refresh: asyncio.TimerHandle | None = None

    @property
    def active(self) -> int:
        """Number of running generations."""
        return len(self._slots.running)

    @property
    def progressing(self) -> int:
        """Number of running generations that progress; the others wait for them."""
        return min(self.active, self._max_progressing)

    @property
    def usual_wait(self) -> float:
        """Most seconds for which a running generation usually waits for the others; 0 if all progress.

        Infinite before the first measurement.
        """
        running = self._slots.running
        if len(running) <= self._max_progressing:
            return 0.0
        times = [self._estimator.total_seconds(ticket.job, self._max_progressing) for ticket in running]
        return sum(math.inf if each is None else each for each in times)

    @property
    def waiting(self) -> int:
        """Number of waiting generations."""
        return len(self._waiting)

    def enter(
        self,
        job: Job,
        caller: str,
        on_move: Callable[[int, float | None], None],
        deadline: float | None = None,
        *,
        restored: bool = False,
        suspect: bool = False,
    ) -> QueueTicket:
        """Takes a place in the queue.

        Restored work is never rejected, because an earlier process accepted it, and it starts gradually.

        Args:
            job: The work.
            caller: Id of the caller; callers share the server evenly. An empty id is the server itself.
            on_move: Called with the position (1 is next) and the estimated seconds to the final image: now, soon after
                they change, and every 10 s until the turn comes.
            deadline: Seconds in which the caller needs the final image; None for no limit. Not checked for restored
                work.
            restored: Whether an earlier process accepted the work.
            suspect: Whether the work ran when an earlier process crashed. At most one such job runs at a time.

        Raises:
            QueueFull: All slots are busy, and the queue or the caller's share of it is full; `retry_after` estimates
                when a place becomes free.
            DeadlineTooShort: The estimated time exceeds the deadline.
        """
        (ticket,) = self.enter_all([(job, on_move)], caller, deadline, restored=restored, suspect=suspect)
        return ticket

    def enter_all(
        self,
        jobs: Sequence[tuple[Job, Callable[[int, float | None], None]]],
        caller: str,
        deadline: float | None = None,
        *,
        restored: bool = False,
        suspect: bool = False,
    ) -> list[QueueTicket]:
        """Takes a place for each of several jobs of one caller, or none. See `require_possible`.

        Args:
            jobs: The work, each with its `on_move`; see `enter`.
            caller: As for `enter`.
            deadline: Seconds in which the caller needs the last final image.
            restored: As for `enter`.
            suspect: As for `enter`.

        Raises:
            QueueFull, DeadlineTooShort: As for `enter`.
        """
        if caller:
            self._callers.note(caller)
        tag = max(self._virtual_time, self._tags.get(caller, 0.0))
        tickets = []
        for job, on_move in jobs:
            order = (job.priority, tag, next(self._arrivals))
            tickets.append(QueueTicket(job, caller, on_move, order, restored, suspect))
            tag += _work(job)
        needed = self._estimates(tickets)
        placed = self._place(tickets, self._slots.copy(), [*self._waiting])
        if placed.overload is not None and not restored:
            raise self._rejection(tickets, placed)
        if not restored and deadline is not None and needed[-1] is not None and needed[-1] > deadline:
            raise self._too_late(needed[-1], deadline)
        self._tags[caller] = tag
        self._slots, self._waiting = placed.slots, placed.waiting
        self._start(placed.started)
        self._report_soon()
        for ticket, seconds in zip(tickets, needed, strict=True):
            ticket.move(self._waiting.index(ticket) + 1 if ticket in self._waiting else 1, seconds)
        return tickets

    def require_possible(self, jobs: Sequence[Job], caller: str) -> None:
        """Raises `InvalidRequest` if the jobs of one caller do not fit together even into the idle server."""
        tickets = [QueueTicket(job, caller, _ignore, (job.priority, 0.0, number)) for number, job in enumerate(jobs)]
        idle = self._place(tickets, self._slots.idle(), [])
        if idle.overload is not None:
            description = f"is {len(jobs)}, but this server accepts at most {idle.count} such images at once"
            raise errors.InvalidRequest([errors.Violation("image_count", description)])

    def leave(self, ticket: QueueTicket) -> None:
        """Gives the place or the slot back. A second call does nothing."""
        if not self._slots.release(ticket):
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        self._fill()
        self._report_soon()

    def seconds_left(self, ticket: QueueTicket, own: float | None) -> float | None:
        """Estimates the seconds to the final image of a running generation. Thread-safe.

        Args:
            ticket: Its ticket.
            own: Estimated seconds without waiting for older generations.
        """
        running = self._slots.running
        ahead = running.index(ticket) if ticket in running else 0
        if ahead < self._max_progressing:
            return own
        works = [Work(each.job, each.left) for each in running[: ahead + 1]]
        times = finish_times(self._estimator, [], works, self._max_progressing)
        return None if times is None else times[-1]

    def _place(self, tickets: Sequence[QueueTicket], slots: Slots, waiting: list[QueueTicket]) -> _Placed:
        """Puts tickets into slots and a queue, which it changes, until one does not fit; restored ones always do."""
        placed = _Placed(slots, waiting)
        for ticket in tickets:
            bisect.insort(waiting, ticket, key=_order)
            placed.started += _start_next(slots, waiting)
            overload = None if ticket.restored or ticket not in waiting else self._overload(ticket, waiting)
            if overload is not None:
                placed.overload = overload
                break
            placed.count += 1
        return placed

    def _overload(self, ticket: QueueTicket, waiting: Sequence[QueueTicket]) -> _Overload | None:
        """Returns why a waiting job exceeds the limits of the queue, or None."""
        # An earlier process gave restored jobs their places. They must not keep new callers out.
        places = sum(not other.restored for other in waiting) - 1
        own = sum(other.caller == ticket.caller for other in waiting) - 1
        if places >= self._max_queue:
            return _Overload(f"The queue is full: {places} generations are waiting.", self._max_queue)
        if own >= self._per_caller:
            return _Overload(f"You already have {own} waiting generations.", self._per_caller, of_caller=True)
        if own and places >= self._contested:
            message = f"You already have {own} waiting generations; the last places are kept for other callers."
            return _Overload(message, own, of_caller=True)
        return None

    def _rejection(self, tickets: Sequence[QueueTicket], placed: _Placed) -> errors.QueueFull:
        """Returns the error for jobs that do not fit now."""
        assert placed.overload is not None
        retry_after = self._seconds_until_free(len(tickets) - placed.count, tickets[0], placed.overload)
        metadata = {"max_queue": str(placed.overload.limit)}
        return errors.QueueFull(placed.overload.message, retry_after=retry_after, metadata=metadata)

    def _seconds_until_free(self, places: int, ticket: QueueTicket, overload: _Overload) -> float:
        """Estimates the seconds until so many places of the queue, or of the caller's share, become free."""
        queue = [each.job for each in self._waiting]
        waiting = [i for i, each in enumerate(self._waiting) if not overload.of_caller or each.caller == ticket.caller]
        # Without a waiting job, the next free slot counts.
        index = waiting[min(places, len(waiting)) - 1] if waiting else len(queue)
        queue.append(ticket.job)
        ends = self._end_times(queue[: index + 1])
        ahead = len(self._slots.running) + index
        if ends is None or not ahead:
            return 1.0
        # The job starts when so many of those before it have ended that one slot is free.
        return max(1.0, sorted(ends[:ahead])[max(0, ahead - self._slots.count)])

    def _too_late(self, needed: float, deadline: float) -> errors.DeadlineTooShort:
        if not self._slots.running:
            self._estimator.lower()
        return errors.DeadlineTooShort(
            f"The image takes about {needed:.1f} s, but the deadline is in {deadline:.1f} s.",
            metadata={"estimated_seconds": f"{needed:.3f}"},
        )

    def _fill(self) -> None:
        self._start(_start_next(self._slots, self._waiting))

    def _start(self, started: Sequence[QueueTicket]) -> None:
        for ticket in started:
            self._virtual_time = max(self._virtual_time, ticket.order[1])
            ticket.start()
        if started:
            self._catch_up()
            self._tags = {caller: tag for caller, tag in self._tags.items() if tag > self._virtual_time}

    def _catch_up(self) -> None:
        """Moves the tags of jobs that were held back up to the virtual time, one after the other for each caller.

        Otherwise all of them would start before the first job of a caller that arrives now.
        """
        if all(ticket.order[1] >= self._virtual_time for ticket in self._waiting):
            return
        ends: dict[str, float] = {}
        for ticket in self._waiting:
            tag = max(ticket.order[1], self._virtual_time, ends.get(ticket.caller, 0.0))
            ticket.postpone(tag)
            ends[ticket.caller] = tag + _work(ticket.job)
            self._tags[ticket.caller] = max(self._tags.get(ticket.caller, 0.0), ends[ticket.caller])
        self._waiting.sort(key=_order)

    def _report_soon(self) -> None:
        """Reports positions once for all changes of this iteration of the event loop."""
        if self._report is None and self._waiting:
            self._report = asyncio.get_running_loop().call_soon(self._report_positions)

    def _report_positions(self, *, again: bool = False) -> None:
        self._report = None
        if self._refresh is not None:
            self._refresh.cancel()
            self._refresh = None
        if self._waiting:
            self._refresh = asyncio.get_running_loop().call_later(_REFRESH_SECONDS, self._refresh_positions)
        jobs = [ticket.job for ticket in self._waiting]
        times = self._end_times(jobs)
        for index, ticket in enumerate(self._waiting, self.active):
            ticket.move(index - self.active + 1, None if times is None else times[index], again=again)

    def _refresh_positions(self) -> None:
        # A slot is no longer kept for callers that have not returned for some minutes.
        self._fill()
        self._report_positions(again=True)

    def _estimates(self, tickets: Sequence[QueueTicket]) -> list[float] | list[None]:
        """Estimated seconds to the final image of each job that is not in the queue yet, if it entered now."""
        queue = sorted([*self._waiting, *tickets], key=_order)
        indexes = [index for index, each in enumerate(queue) if each in tickets]
        jobs = [each.job for each in queue[: indexes[-1] + 1]]
        times = self._end_times(jobs)
        return [None] * len(tickets) if times is None else [times[self.active + index] for index in indexes]

    def _end_times(self, queue: Sequence[Job]) -> list[float] | None:
        """Estimated seconds to the end of each running generation and of each job, if they wait in this order.

        None before the first measurement.
        """
        works = [*(Work(ticket.job, ticket.left) for ticket in self._slots.running), *map(Work, queue)]
        return finish_times(self._estimator, [], works, self._max_progressing)


@dataclass(frozen=True, slots=True)
class _Overload:
    """Why a job finds no place."""

    message: str
    limit: int
    of_caller: bool = False
    """Whether the limit is one of the caller, not of the whole queue."""


@dataclass(slots=True)
class _Placed:
    """The slots and the queue with further jobs, of which `count` fit and `started` have a slot."""

    slots: Slots
    waiting: list[QueueTicket]
    started: list[QueueTicket] = field(default_factory=list)
    count: int = 0
    overload: _Overload | None = None


def _ignore(position: int, seconds: float | None) -> None:
    """Stands for a caller that needs no positions."""


def _order(ticket: QueueTicket) -> tuple[int, float, int]:
    return ticket.order


def _work(job: Job) -> int:
    return job.pixel_count * job.computed_step_count


def _start_next(slots: Slots, waiting: list[QueueTicket]) -> list[QueueTicket]:
    """Moves waiting jobs to free slots as far as the rules permit, and returns them."""
    started = []
    while ticket := slots.next(waiting):
        waiting.remove(ticket)
        slots.take(ticket)
        started.append(ticket)
    return started
