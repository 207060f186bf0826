"""Who may start, and when: a bounded queue that refuses overload and hopeless deadlines at once.

Lives in the event loop; nothing here is thread-safe, and nothing needs to be.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calotype_server import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.estimates import Pace
    from calotype_server.types import Job

__all__ = ["Admission", "Ticket"]


@dataclass(eq=False)
class Ticket:
    """A place in the queue and, after its turn came, a slot. Leave it exactly when the work has truly ended."""

    job: Job
    on_move: Callable[[int, float | None], None]
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    started_at: float | None = None


class Admission:
    """A first-come-first-served queue in front of `max_active` slots.

    Args:
        pace: Estimates, for waits and deadlines.
        max_active: Generations at work at once, from 1.
        max_queue: Generations waiting at most, from 0.
    """

    def __init__(self, pace: Pace, *, max_active: int, max_queue: int) -> None:
        self._pace = pace
        self._max_active = max_active
        self._max_queue = max_queue
        self._active: list[Ticket] = []
        self._waiting: list[Ticket] = []

    def enter(self, job: Job, on_move: Callable[[int, float | None], None], deadline: float | None = None) -> Ticket:
        """Takes a place, or refuses at once.

        Args:
            job: The work.
            on_move: Called with the position (1 is the next to start) and the estimated seconds to the final image,
                now and whenever they change, until the turn comes.
            deadline: Seconds that the caller is willing to wait for the final image; None for ever.

        Raises:
            QueueFull: All slots are busy and the queue is full; `retry_after` says when a place is likely.
            DeadlineTooShort: The picture cannot be there in time, as far as measured.
        """
        free = len(self._active) < self._max_active
        if not free and len(self._waiting) >= self._max_queue:
            raise errors.QueueFull(
                f"The queue is full: {len(self._waiting)} are waiting.",
                retry_after=max(1.0, self._seconds_left_in_slots() / self._max_active),
                metadata={"max_queue": str(self._max_queue)},
            )
        needed = self._seconds_to_finish(job, len(self._waiting))
        if deadline is not None and needed is not None and needed > deadline:
            if not self._active:
                self._pace.doubt()
            raise errors.DeadlineTooShort(
                f"The picture needs about {needed:.1f} s, the deadline is in {deadline:.1f} s.",
                metadata={"estimated_seconds": f"{needed:.3f}"},
            )
        ticket = Ticket(job, on_move)
        self._waiting.append(ticket)
        on_move(len(self._waiting), needed)
        self._fill()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Gives the place or the slot back. Idempotent."""
        if ticket in self._active:
            self._active.remove(ticket)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        else:
            return
        self._fill()
        for index, waiting in enumerate(self._waiting):
            waiting.on_move(index + 1, self._seconds_to_finish(waiting.job, index))

    def _fill(self) -> None:
        while self._waiting and len(self._active) < self._max_active:
            ticket = self._waiting.pop(0)
            ticket.started_at = time.monotonic()
            self._active.append(ticket)
            if not ticket.turn.done():
                ticket.turn.set_result(None)

    def _seconds_to_finish(self, job: Job, ahead: int) -> float | None:
        """Seconds to the final image of a job that has the first `ahead` waiting tickets before it."""
        totals = [self._pace.total_seconds(each) for each in [*(t.job for t in self._waiting[:ahead]), job]]
        if any(total is None for total in totals):
            return None
        own = totals.pop() or 0.0
        if ahead == 0 and len(self._active) < self._max_active:
            return own
        return own + (sum(filter(None, totals)) + self._seconds_left_in_slots()) / self._max_active

    def _seconds_left_in_slots(self) -> float:
        now = time.monotonic()
        left = 0.0
        for ticket in self._active:
            total = self._pace.total_seconds(ticket.job) or 0.0
            left += max(0.0, total - (now - (ticket.started_at or now)))
        return left
