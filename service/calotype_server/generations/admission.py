"""Who may start, and when: a bounded, fair queue that refuses overload and hopeless deadlines at once.

The order is that of start-time fair queueing (Goyal, Vin & Cheng 1996, "Start-time Fair Queuing"): each caller has a
line of their own whose jobs are tagged with the work that went before them, and the smallest tag is next. So a caller
who queues a hundred pictures delays another's first by one, and alone has the whole server. Within that, INTERACTIVE
goes before BATCH, and of several slots one is never given to BATCH.

Lives in the event loop; nothing here is thread-safe, and nothing needs to be.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.generations.estimates import Work, finish_times
from calotype_server.types import Priority

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.generations.estimates import StepTimeEstimator
    from calotype_server.types import Job

__all__ = ["Admission", "QueueTicket"]


_REFRESH_SECONDS = 10.0
"""Between two estimates for those who wait, at most. Time passes also where nothing moves, and proxies cut a stream
that is silent for a minute."""


@dataclass(eq=False)
class QueueTicket:
    """A place in the queue and, after its turn came, a slot. Leave it exactly when the work has truly ended.

    Attributes:
        job: The work.
        caller: Whose it is.
        on_move: Told the position and the estimate.
        order: What the queue is sorted by: priority, tag, arrival.
        turn: Done when the work may start.
        left: Share of the work that is left, 0 to 1; whoever does it keeps it up to date.
    """

    job: Job
    caller: str
    on_move: Callable[[int, float | None], None]
    order: tuple[int, float, int]
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    left: float = 1.0


class Admission:
    """A fair queue in front of `max_active` slots.

    Args:
        pace: Estimates, for waits and deadlines.
        max_active: Generations at work at once, from 1.
        max_queue: Generations waiting at most, from 0.
        max_queue_per_caller: Generations of one caller waiting at most; None for no limit but `max_queue`.
    """

    def __init__(
        self, pace: StepTimeEstimator, *, max_active: int, max_queue: int, max_queue_per_caller: int | None = None
    ) -> None:
        self._pace = pace
        self._max_active = max_active
        self._max_queue = max_queue
        self._max_queue_per_caller = max_queue if max_queue_per_caller is None else max_queue_per_caller
        self._active: list[QueueTicket] = []
        self._waiting: list[QueueTicket] = []
        self._arrivals = itertools.count()
        self._virtual_time = 0.0
        self._tags: dict[str, float] = {}
        """Tag that the next job of a caller gets at least; only of callers who are ahead of the virtual time."""
        self._refresh: asyncio.TimerHandle | None = None

    @property
    def active(self) -> int:
        """Generations at work."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Generations that wait for their turn."""
        return len(self._waiting)

    def enter(
        self, job: Job, caller: str, on_move: Callable[[int, float | None], None], deadline: float | None = None
    ) -> QueueTicket:
        """Takes a place, or refuses at once.

        Args:
            job: The work.
            caller: Whose it is; callers share the server evenly.
            on_move: Called with the position (1 is the next to start) and the estimated seconds to the final image,
                now, whenever they change and every few seconds, until the turn comes.
            deadline: Seconds that the caller is willing to wait for the final image; None for ever.

        Raises:
            QueueFull: All slots are busy, and the queue or the caller's share of it is full; `retry_after` says when a
                place is likely.
            DeadlineTooShort: The picture cannot be there in time, as far as measured.
        """
        tag = max(self._virtual_time, self._tags.get(caller, 0.0))
        ticket = QueueTicket(job, caller, on_move, (job.priority, tag, next(self._arrivals)))
        waiting = sorted([*self._waiting, ticket], key=lambda each: each.order)
        if waiting[0] is not ticket or len(self._active) >= self._slots(job):
            self._refuse_overload(job, caller)
        needed = self._estimates(waiting)[waiting.index(ticket)]
        if deadline is not None and needed is not None and needed > deadline:
            if not self._active:
                self._pace.doubt()
            raise errors.DeadlineTooShort(
                f"The picture needs about {needed:.1f} s, the deadline is in {deadline:.1f} s.",
                metadata={"estimated_seconds": f"{needed:.3f}"},
            )
        self._tags[caller] = tag + job.pixel_count * job.step_count
        self._waiting = waiting
        self._fill()
        self._tell()
        if ticket in self._active:
            on_move(1, needed)
        return ticket

    def leave(self, ticket: QueueTicket) -> None:
        """Gives the place or the slot back. Idempotent."""
        if ticket in self._active:
            self._active.remove(ticket)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        else:
            return
        self._fill()
        self._tell()

    def _refuse_overload(self, job: Job, caller: str) -> None:
        own = sum(ticket.caller == caller for ticket in self._waiting)
        if len(self._waiting) >= self._max_queue:
            message, limit = f"The queue is full: {len(self._waiting)} are waiting.", self._max_queue
        elif own >= self._max_queue_per_caller:
            message, limit = f"You have {own} waiting already.", self._max_queue_per_caller
        else:
            return
        times = finish_times(self._pace, [Work(each.job, each.left) for each in self._active], [job], self._max_active)
        own_seconds = self._pace.total_seconds(job) or 0.0
        retry_after = max(1.0, times[0] - own_seconds) if times else 1.0
        raise errors.QueueFull(message, retry_after=retry_after, metadata={"max_queue": str(limit)})

    def _slots(self, job: Job) -> int:
        """Slots that a job may take: of several, one is kept for whoever waits in person."""
        return self._max_active - (job.priority is Priority.BATCH and self._max_active > 1)

    def _fill(self) -> None:
        while self._waiting and len(self._active) < self._slots(self._waiting[0].job):
            ticket = self._waiting.pop(0)
            self._virtual_time = max(self._virtual_time, ticket.order[1])
            self._tags = {caller: tag for caller, tag in self._tags.items() if tag > self._virtual_time}
            self._active.append(ticket)
            if not ticket.turn.done():
                ticket.turn.set_result(None)

    def _tell(self) -> None:
        if self._refresh is not None:
            self._refresh.cancel()
            self._refresh = None
        if self._waiting:
            self._refresh = asyncio.get_running_loop().call_later(_REFRESH_SECONDS, self._tell)
        for index, (ticket, needed) in enumerate(zip(self._waiting, self._estimates(self._waiting), strict=True)):
            ticket.on_move(index + 1, needed)

    def _estimates(self, waiting: list[QueueTicket]) -> list[float] | list[None]:
        """Seconds to the final image of each that waits."""
        running = [Work(ticket.job, ticket.left) for ticket in self._active]
        times = finish_times(self._pace, running, [ticket.job for ticket in waiting], self._max_active)
        return [None] * len(waiting) if times is None else times
