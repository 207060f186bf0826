"""The slots that generations run in, and the rules for who may take a free one.

Lives in the event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calotype_server.types import Priority

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from calotype_server.types import Job, MemoryModel

__all__ = ["QueueTicket", "RecentCallers", "Slots"]

_RECENT_SECONDS = 600.0
"""Time for which a slot is kept for a caller after its last request."""


@dataclass(eq=False)
class QueueTicket:
    """A place in the queue, and a slot once its turn has come. Give it back with `Admission.leave` when the work ends.

    Attributes:
        job: The work.
        caller: Id of the caller.
        on_move: Called by `move`.
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
    _place: tuple[int, float | None] | None = None

    def move(self, position: int, seconds: float | None, *, again: bool = False) -> None:
        """Reports the position and the estimated seconds to the final image, if they changed or if `again`."""
        if again or (position, seconds) != self._place:
            self._place = position, seconds
            self.on_move(position, seconds)

    def note_left(self, share: float) -> None:
        """Records progress: the share of the work that is left, 0 to 1. It never rises. Thread-safe."""
        self.left = min(self.left, share)

    def postpone(self, tag: float) -> None:
        """Changes the tag in `order`."""
        priority, _, arrival = self.order
        self.order = priority, tag, arrival

    def start(self) -> None:
        """Announces the turn."""
        if not self.turn.done():
            self.turn.set_result(None)


class RecentCallers:
    """Knows whether a caller shares the server with others at the moment.

    Args:
        always: Whether to assume so without evidence.
        clock: Returns monotonic seconds.
    """

    def __init__(self, *, always: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._always = always
        self._clock = clock
        self._seen: dict[str, float] = {}
        """Times of the last requests of the two newest callers: whichever caller asks, one of them is another."""

    def forgotten(self) -> RecentCallers:
        """Returns the same without recent requests."""
        return RecentCallers(always=self._always, clock=self._clock)

    def note(self, caller: str) -> None:
        """Records a request of a caller."""
        self._seen.pop(caller, None)
        self._seen[caller] = self._clock()
        while len(self._seen) > 2:
            del self._seen[next(iter(self._seen))]

    def include_others_than(self, caller: str) -> bool:
        """Returns whether another caller sent a request in the last ten minutes."""
        since = self._clock() - _RECENT_SECONDS
        return self._always or any(other != caller and seen >= since for other, seen in self._seen.items())


class Slots:
    """The running work. A free slot goes to the first waiting work that no rule holds back.

    - With several slots, BATCH work never takes the last free one.
    - With several slots and several callers, a caller that holds all other slots does not take the last one, and it
      leaves the memory for an image of the model's default size.
    - Restored work starts in one slot. Each restored generation that ends doubles the number of slots that restored
      work may use: if one of them crashes the process again, few others are affected.
    - Of the suspect work, at most one runs at a time, so that another crash identifies its cause.

    Work that such a rule holds back keeps its place in the queue, and work behind it may start earlier. If the memory
    beside the running work is too small, all work behind it waits as well: otherwise small images would delay a large
    one forever. Without running work, everything fits.

    Args:
        count: Number of slots, at least 1.
        callers: The callers that share the slots.
        memory: Memory that the work needs; None to ignore it.
        spare: Pixels of an image of the default size.
    """

    def __init__(self, count: int, callers: RecentCallers, memory: MemoryModel | None = None, spare: int = 0) -> None:
        self.count = count
        self._callers = callers
        self._memory = memory
        self._spare = spare
        self._running: list[QueueTicket] = []
        self._restored_limit = 1

    @property
    def running(self) -> tuple[QueueTicket, ...]:
        """The running work, in order of its start."""
        return tuple(self._running)

    def copy(self) -> Slots:
        """Returns slots with the same running work."""
        copy = self._with(self._callers)
        copy._running = [*self._running]
        copy._restored_limit = self._restored_limit
        return copy

    def idle(self) -> Slots:
        """Returns the same slots without running work, and without callers that were seen recently."""
        return self._with(self._callers.forgotten())

    def _with(self, callers: RecentCallers) -> Slots:
        return Slots(self.count, callers, self._memory, self._spare)

    def next(self, waiting: Iterable[QueueTicket]) -> QueueTicket | None:
        """Returns the first waiting work that may take a slot now, or None.

        Args:
            waiting: The waiting work in order.
        """
        if len(self._running) >= self.count:
            return None
        holds_back = self._rules()
        found = next((ticket for ticket in waiting if not holds_back(ticket)), None)
        return found if found is not None and self._fits(found) else None

    def take(self, ticket: QueueTicket) -> None:
        """Gives a slot to the work."""
        self._running.append(ticket)

    def release(self, ticket: QueueTicket) -> bool:
        """Takes the slot back. Returns False if the work has none."""
        if ticket not in self._running:
            return False
        self._running.remove(ticket)
        if ticket.restored:
            self._restored_limit = min(self.count, self._restored_limit * 2)
        return True

    def _rules(self) -> Callable[[QueueTicket], bool]:
        """Returns a function that is true for work that a rule holds back. Its cost does not depend on the slots."""
        running = self._running
        last = self.count > 1 and len(running) == self.count - 1
        suspect = any(ticket.suspect for ticket in running)
        ramping = sum(ticket.restored for ticket in running) >= self._restored_limit
        callers = {ticket.caller for ticket in running}
        # The only caller that holds slots, if there are others.
        sole = callers.pop() if len(callers) == 1 else None
        if sole is not None and not self._callers.include_others_than(sole):
            sole = None

        def holds_back(ticket: QueueTicket) -> bool:
            return (
                (last and ticket.job.priority is Priority.BATCH)
                or (suspect and ticket.suspect)
                or (ramping and ticket.restored)
                or (ticket.caller == sole and (last or not self._fits(ticket, self._spare)))
            )

        return holds_back

    def _fits(self, ticket: QueueTicket, *further: int) -> bool:
        """Whether there is memory for the work beside all running work and images of `further` sizes, in pixels."""
        if self._memory is None or not self._running:
            return True
        sizes = [*(other.job.pixel_count for other in self._running), ticket.job.pixel_count, *further]
        return self._memory.need(sizes) <= self._memory.available
