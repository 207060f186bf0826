"""Which waiting calls run next. No threads and no clock: whoever asks says what time it is.

Calls of one signature form a group. A group is *ready* when nothing is gained by waiting longer: everybody who is
expected in it has arrived, or no further call would fit, or a free device has waited for it for `max_wait`. Of the
groups that are ready the one with the oldest call goes first, and within a group the oldest calls: who just ran is
behind all who wait, so that everybody has a turn when more are active than fit.

A request is expected only between an answer and its next call, and only if it was on_time the last time: waiting for
a slow one costs the others `max_wait` once, not once a step.
"""

from __future__ import annotations

import contextvars
import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable

    from calotype_server.engine.batching.collate import Call

__all__ = ["BatchScheduler", "PendingCall", "RequestSlot"]

_SHARE_OF_STEP = 0.25
_SHORTEST_WAIT = 0.002
_LONGEST_WAIT = 0.05
_SMOOTHING = 0.2


@dataclass(eq=False, slots=True)
class RequestSlot:
    """What is known of one request."""

    number: int
    rows: int = 0
    """Of its last call."""
    expected: Hashable | None = None
    """Signature of the call that it should make next, while it is waited for."""
    on_time: bool = True
    """Whether it made its last call within `max_wait` of the answer before."""
    answered: float | None = None
    """When it got its last answer; None while a call waits, and before the first."""
    last: Hashable | None = None
    following: dict[Hashable, Hashable] = field(default_factory=dict)
    """Signature to the next one: guidance in two calls alternates when the prompts differ in length."""


@dataclass(eq=False, slots=True)
class PendingCall:
    """A call that waits.

    Attributes:
        seat: Whose it is.
        call: What to run.
        arrived: Since when, in seconds.
        offered: Since when the device could have run it.
        future: For whoever runs the call to answer it.
        batch_rows: Rows that were computed together with it, its own included; known when it is answered.
        context: Of whoever waits, so that lines logged for it carry its ids.
    """

    seat: RequestSlot
    call: Call
    arrived: float
    offered: float = math.inf
    future: Future[Any] = field(default_factory=Future)
    batch_rows: int = 0
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class BatchScheduler:
    """Waiting calls and expected ones; not thread-safe.

    Args:
        max_rows: Most rows to run at once, from 1. A call with more rows than that runs alone.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.waiting: list[PendingCall] = []
        """In the order of arrival."""
        self._expected: set[RequestSlot] = set()
        self._step_seconds: float | None = None

    @property
    def max_wait(self) -> float:
        """Longest time that a call waits for others, in seconds: a quarter of a step, from 2 to 50 ms."""
        return min(max(_SHARE_OF_STEP * (self._step_seconds or 0.0), _SHORTEST_WAIT), _LONGEST_WAIT)

    def observe(self, seconds: float) -> None:
        """Takes the duration of a step into the moving average."""
        before = self._step_seconds
        self._step_seconds = seconds if before is None else before + _SMOOTHING * (seconds - before)

    def arrive(self, ticket: PendingCall) -> None:
        """Adds a call; its request's former one has been answered."""
        seat, call = ticket.seat, ticket.call
        self.stop_waiting_for(seat)
        seat.on_time = seat.answered is None or ticket.arrived - seat.answered <= self.max_wait
        seat.answered = None
        if seat.last is not None:
            seat.following[seat.last] = call.signature
        seat.last, seat.rows = call.signature, call.rows
        self.waiting.append(ticket)

    def expect(self, seat: RequestSlot, now: float) -> None:
        """Notes that a request got its answer, and may come back with its next call."""
        seat.answered = now
        if seat.on_time:
            seat.expected = seat.following.get(seat.last, seat.last)
            self._expected.add(seat)

    def stop_waiting_for(self, seat: RequestSlot) -> None:
        """Waits for a request no longer, until its next answer."""
        seat.expected = None
        self._expected.discard(seat)

    def withdraw(self, ticket: PendingCall) -> None:
        """Takes back a call, if it still waits."""
        if ticket in self.waiting:
            self.waiting.remove(ticket)

    def pick(self, now: float) -> tuple[list[PendingCall], float | None]:
        """Takes out the calls to run now; to be asked when the device is free.

        Returns:
            The calls, and None; or no calls, and when to ask again at the latest: None when nothing waits.
        """
        groups: dict[Hashable, list[PendingCall]] = {}
        for ticket in self.waiting:
            groups.setdefault(ticket.call.signature, []).append(ticket)
            ticket.offered = min(ticket.offered, now)
        deadline = None
        for signature, group in groups.items():  # the group with the oldest call first
            limit = group[0].offered + self.max_wait
            missing = [seat for seat in self._expected if seat.expected == signature]
            if missing and now >= limit:
                for seat in missing:
                    self.stop_waiting_for(seat)
                missing = []
            room = self.max_rows - sum(ticket.call.rows for ticket in group)
            if all(seat.rows > room for seat in missing):
                return self._take(group), None
            deadline = limit if deadline is None else min(deadline, limit)
        return [], deadline

    def _take(self, group: list[PendingCall]) -> list[PendingCall]:
        rows = 0
        taken: list[PendingCall] = []
        for ticket in group:
            rows += ticket.call.rows
            if taken and rows > self.max_rows:
                break
            taken.append(ticket)
        self.waiting = [ticket for ticket in self.waiting if ticket not in taken]
        return taken
