"""A bounded, fair queue that rejects overload and impossible deadlines at once.

The order is that of start-time fair queueing (Goyal, Vin & Cheng 1996, "Start-time Fair Queuing"): every job is tagged
with the work that its caller queued before it, and the smallest tag is next. So a caller that queues a hundred images
delays another caller's first image by one, and a single caller can use the whole server. INTERACTIVE jobs run before
BATCH jobs. `slots` has the rules for who may take a free slot.

Lives in the event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.generations.estimates import Work, finish_times
from calotype_server.generations.slots import QueueTicket, Slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.generations.estimates import StepTimeEstimator
    from calotype_server.types import Job

__all__ = ["Admission", "QueueTicket"]


_REFRESH_SECONDS = 10.0
"""Longest time between two estimates for waiting jobs. Proxies close a stream without a message for a minute."""


class Admission:
    """A fair queue in front of `max_active` slots.

    Args:
        estimator: Estimates waits, for positions and deadlines.
        max_active: Number of slots: generations that run at once, at least 1.
        max_queue: Largest number of waiting generations, at least 0.
        max_queue_per_caller: Largest number of waiting generations of one caller; None for `max_queue`.
    """

    def __init__(
        self, estimator: StepTimeEstimator, *, max_active: int, max_queue: int, max_queue_per_caller: int | None = None
    ) -> None:
        self._estimator = estimator
        self._slots = Slots(max_active)
        self._max_queue = max_queue
        self._max_queue_per_caller = max_queue if max_queue_per_caller is None else max_queue_per_caller
        self._waiting: list[QueueTicket] = []
        self._arrivals = itertools.count()
        self._virtual_time = 0.0
        self._tags: dict[str, float] = {}
        """Least tag of a caller's next job, for callers that are ahead of the virtual time."""
        self._refresh: asyncio.TimerHandle | None = None

    @property
    def active(self) -> int:
        """Number of running generations."""
        return len(self._slots.running)

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
            caller: Id of the caller; callers share the server evenly.
            on_move: Called with the position (1 is next) and the estimated seconds to the final image: now, whenever
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
        tag = max(self._virtual_time, self._tags.get(caller, 0.0))
        ticket = QueueTicket(job, caller, on_move, (job.priority, tag, next(self._arrivals)), restored, suspect)
        waiting = sorted([*self._waiting, ticket], key=lambda each: each.order)
        if not restored and self._slots.next(waiting) is not ticket:
            self._reject_overload(job, caller)
        needed = self._estimates(waiting)[waiting.index(ticket)]
        if not restored and deadline is not None and needed is not None and needed > deadline:
            if not self._slots.running:
                self._estimator.lower()
            raise errors.DeadlineTooShort(
                f"The image takes about {needed:.1f} s, but the deadline is in {deadline:.1f} s.",
                metadata={"estimated_seconds": f"{needed:.3f}"},
            )
        self._tags[caller] = tag + job.pixel_count * job.step_count
        self._waiting = waiting
        self._fill()
        self._report_positions()
        if ticket not in self._waiting:
            on_move(1, needed)
        return ticket

    def leave(self, ticket: QueueTicket) -> None:
        """Gives the place or the slot back. A second call does nothing."""
        if not self._slots.release(ticket):
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        self._fill()
        self._report_positions()

    def _reject_overload(self, job: Job, caller: str) -> None:
        own = sum(ticket.caller == caller for ticket in self._waiting)
        if len(self._waiting) >= self._max_queue:
            message, limit = f"The queue is full: {len(self._waiting)} generations are waiting.", self._max_queue
        elif own >= self._max_queue_per_caller:
            message, limit = f"You already have {own} waiting generations.", self._max_queue_per_caller
        else:
            return
        times = finish_times(self._estimator, self._running_work(), [job], self._slots.count)
        own_seconds = self._estimator.total_seconds(job) or 0.0
        retry_after = max(1.0, times[0] - own_seconds) if times else 1.0
        raise errors.QueueFull(message, retry_after=retry_after, metadata={"max_queue": str(limit)})

    def _fill(self) -> None:
        while ticket := self._slots.next(self._waiting):
            self._waiting.remove(ticket)
            self._virtual_time = max(self._virtual_time, ticket.order[1])
            self._tags = {caller: tag for caller, tag in self._tags.items() if tag > self._virtual_time}
            self._slots.take(ticket)

    def _report_positions(self) -> None:
        if self._refresh is not None:
            self._refresh.cancel()
            self._refresh = None
        if self._waiting:
            self._refresh = asyncio.get_running_loop().call_later(_REFRESH_SECONDS, self._report_positions)
        for index, (ticket, needed) in enumerate(zip(self._waiting, self._estimates(self._waiting), strict=True)):
            ticket.on_move(index + 1, needed)

    def _estimates(self, waiting: list[QueueTicket]) -> list[float] | list[None]:
        """Estimated seconds to the final image of each waiting job."""
        jobs = [ticket.job for ticket in waiting]
        times = finish_times(self._estimator, self._running_work(), jobs, self._slots.count)
        return [None] * len(waiting) if times is None else times

    def _running_work(self) -> list[Work]:
        return [Work(ticket.job, ticket.left) for ticket in self._slots.running]
