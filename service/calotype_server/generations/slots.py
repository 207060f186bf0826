"""The slots that generations run in, and the rules for who may take a free one.

Lives in the event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calotype_server.types import Priority

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from calotype_server.types import Job

__all__ = ["QueueTicket", "Slots"]


@dataclass(eq=False)
class QueueTicket:
    """A place in the queue, and a slot once its turn has come. Give it back with `Admission.leave` when the work ends.

    Attributes:
        job: The work.
        caller: Id of the caller.
        on_move: Called with the position and the estimated seconds to the final image.
        order: Sort key of the queue: priority, tag, arrival.
        restored: Whether the work was accepted by an earlier process.
        suspect: Whether the work ran when an earlier process crashed.
        turn: Done when the work may start.
        left: Share of the work that is left, 0 to 1.
    """

    job: Job
    caller: str
    on_move: Callable[[int, float | None], None]
    order: tuple[int, float, int]
    restored: bool = False
    suspect: bool = False
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    left: float = 1.0

    def note_left(self, share: float) -> None:
        """Records progress: the share of the work that is left, 0 to 1. It never rises. Thread-safe."""
        self.left = min(self.left, share)


class Slots:
    """The running work. A free slot goes to the first waiting work that no rule holds back.

    - With several slots, BATCH work never takes the last one.
    - Restored work starts in one slot. Each restored generation that ends doubles the number of slots that restored
      work may use: if one of them crashes the process again, few others are affected.
    - Of the suspect work, at most one runs at a time, so that another crash identifies its cause.

    Work that a rule holds back keeps its place in the queue, and work behind it may start earlier.

    Args:
        count: Number of slots, at least 1.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._running: list[QueueTicket] = []
        self._restored_limit = 1

    @property
    def running(self) -> tuple[QueueTicket, ...]:
        """The running work, in order of its start."""
        return tuple(self._running)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self.count - len(self._running)

    def next(self, waiting: Iterable[QueueTicket]) -> QueueTicket | None:
        """Returns the first waiting work that may take a slot now, or None.

        Args:
            waiting: The waiting work in order.
        """
        return next((ticket for ticket in waiting if self._may_start(ticket)), None) if self.free > 0 else None

    def take(self, ticket: QueueTicket) -> None:
        """Gives a slot to the work, which may start."""
        self._running.append(ticket)
        if not ticket.turn.done():
            ticket.turn.set_result(None)

    def release(self, ticket: QueueTicket) -> bool:
        """Takes the slot back. Returns False if the work has none."""
        if ticket not in self._running:
            return False
        self._running.remove(ticket)
        if ticket.restored:
            self._restored_limit = min(self.count, self._restored_limit * 2)
        return True

    def _may_start(self, ticket: QueueTicket) -> bool:
        if ticket.job.priority is Priority.BATCH and self.count > 1 and self.free == 1:
            return False
        if ticket.suspect and any(other.suspect for other in self._running):
            return False
        return not ticket.restored or sum(other.restored for other in self._running) < self._restored_limit
