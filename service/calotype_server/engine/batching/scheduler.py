"""Decides which waiting calls run next. It has no threads and no clock: callers pass the current time in.

Calls with the same signature form a group. A group is *ready* when waiting longer gains nothing: all requests that are
expected in it have arrived, or no further call would fit, or the idle device has waited for `max_wait`. Of the groups
that are ready, the one with the oldest call runs first, and within a group the oldest calls. A request that just ran is
therefore behind all that wait, so requests take turns when more are active than fit.

A request is expected only between an answer and its next call, and only if it was on time for the last step. A slow
request therefore delays the others by `max_wait` once, not at every step.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable

    from calotype_server.engine.runtime.collate import Call

__all__ = ["BatchScheduler", "PendingCall", "RequestSlot"]

_SHARE_OF_STEP = 0.25
_MIN_WAIT_SECONDS = 0.002
_MAX_WAIT_SECONDS = 0.05
_NEWEST_WEIGHT = 0.2
"""Weight of the newest step in the moving average of step times."""


@dataclass(eq=False, slots=True)
class PendingCall:
    """A call that waits for its answer.

    Attributes:
        slot: The request that makes it.
        call: The arguments.
        arrived: Time of arrival in seconds.
        device_free_since: Time in seconds since which the device could have run it; infinite while it was busy.
        future: Receives the answer.
        batch_rows: Rows that were computed together with it, its own included. Set with the answer.
        context: Of the thread that waits, so that lines logged for the call carry the request's ids.
    """

    slot: RequestSlot
    call: Call
    arrived: float
    device_free_since: float = math.inf
    future: Future[Any] = field(default_factory=Future)
    batch_rows: int = 0
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def offer(self, now: float) -> None:
        """Records that the device is free for this call."""
        self.device_free_since = min(self.device_free_since, now)

    def answer(self, value: Any, batch_rows: int) -> None:
        """Gives the call its result, unless it is already settled."""
        if self.future.done():
            return
        self.batch_rows = batch_rows
        with contextlib.suppress(InvalidStateError):  # It was cancelled meanwhile.
            self.future.set_result(value)

    def fail(self, error: BaseException) -> None:
        """Makes the call raise, unless it is already settled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(eq=False, slots=True)
class RequestSlot:
    """The scheduler's state of one request.

    Attributes:
        number: Identifies the request in records of batches.
        rows: Rows of its last call.
        expected: Signature of the call that it should make next, while others wait for it.
        on_time: Whether it made its last call within `max_wait` of the answer before.
        answered_at: Time of its last answer in seconds; None while a call waits, and before the first.
        last_signature: Signature of its last call.
        next_signatures: Maps a signature to the one that followed it: with classifier-free guidance in two calls, two
            signatures alternate if the prompts differ in length.
    """

    number: int
    rows: int = 0
    expected: Hashable | None = None
    on_time: bool = True
    answered_at: float | None = None
    last_signature: Hashable | None = None
    next_signatures: dict[Hashable, Hashable] = field(default_factory=dict)

    def note_call(self, call: Call, now: float, max_wait: float) -> None:
        """Records that the request made a call."""
        self.expected = None
        self.on_time = self.answered_at is None or now - self.answered_at <= max_wait
        self.answered_at = None
        if self.last_signature is not None:
            self.next_signatures[self.last_signature] = call.signature
        self.last_signature, self.rows = call.signature, call.rows

    def note_answer(self, now: float) -> bool:
        """Records that the request got its answer; returns whether to expect its next call."""
        self.answered_at = now
        if self.on_time:
            self.expected = self.next_signatures.get(self.last_signature, self.last_signature)
        return self.on_time

    def stop_expecting(self) -> None:
        """Records that nothing waits for the request's next call."""
        self.expected = None


class BatchScheduler:
    """Keeps the waiting calls and the expected requests. Not thread-safe.

    Args:
        max_rows: Most rows to run at once, from 1. A call with more rows than that runs alone.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._waiting: list[PendingCall] = []
        self._expected: set[RequestSlot] = set()
        self._step_seconds: float | None = None

    @property
    def max_rows(self) -> int:
        """Most rows to run at once."""
        return self._max_rows

    @property
    def waiting(self) -> tuple[PendingCall, ...]:
        """The waiting calls in the order of arrival."""
        return tuple(self._waiting)

    @property
    def expected(self) -> frozenset[RequestSlot]:
        """The requests whose next call others wait for."""
        return frozenset(self._expected)

    @property
    def max_wait(self) -> float:
        """Longest time that a call waits for others, in seconds: a quarter of a step, but 2 to 50 ms."""
        return min(max(_SHARE_OF_STEP * (self._step_seconds or 0.0), _MIN_WAIT_SECONDS), _MAX_WAIT_SECONDS)

    def limit_rows(self, max_rows: int) -> None:
        """Changes the most rows to run at once."""
        self._max_rows = max_rows

    def observe(self, seconds: float) -> None:
        """Adds the duration of a step to the moving average."""
        before = self._step_seconds
        self._step_seconds = seconds if before is None else before + _NEWEST_WEIGHT * (seconds - before)

    def arrive(self, pending: PendingCall) -> None:
        """Adds a call; the request's previous call must have been answered."""
        slot = pending.slot
        self.stop_waiting_for(slot)
        slot.note_call(pending.call, pending.arrived, self.max_wait)
        self._waiting.append(pending)

    def expect(self, slot: RequestSlot, now: float) -> None:
        """Records that a request got its answer and may make its next call soon."""
        if slot.note_answer(now):
            self._expected.add(slot)

    def stop_waiting_for(self, slot: RequestSlot) -> None:
        """Stops expecting a request, until its next answer."""
        slot.stop_expecting()
        self._expected.discard(slot)

    def withdraw(self, pending: PendingCall) -> None:
        """Removes a call if it still waits."""
        if pending in self._waiting:
            self._waiting.remove(pending)

    def take_all(self) -> list[PendingCall]:
        """Removes and returns all waiting calls."""
        taken, self._waiting = self._waiting, []
        return taken

    def pick(self, now: float) -> tuple[list[PendingCall], float | None]:
        """Removes and returns the calls to run now. Call it when the device is free.

        Returns:
            The calls, and None; or no calls, and the time by which to ask again, which is None if nothing waits.
        """
        groups: dict[Hashable, list[PendingCall]] = {}
        for pending in self._waiting:
            groups.setdefault(pending.call.signature, []).append(pending)
            pending.offer(now)
        deadline = None
        for signature, group in groups.items():  # The group with the oldest call comes first.
            limit = group[0].device_free_since + self.max_wait
            missing = [slot for slot in self._expected if slot.expected == signature]
            if missing and now >= limit:
                for slot in missing:
                    self.stop_waiting_for(slot)
                missing = []
            room = self._max_rows - sum(pending.call.rows for pending in group)
            if all(slot.rows > room for slot in missing):
                return self._take(group), None
            deadline = limit if deadline is None else min(deadline, limit)
        return [], deadline

    def _take(self, group: list[PendingCall]) -> list[PendingCall]:
        rows = 0
        taken: list[PendingCall] = []
        for pending in group:
            rows += pending.call.rows
            if taken and rows > self._max_rows:
                break
            taken.append(pending)
        self._waiting = [pending for pending in self._waiting if pending not in taken]
        return taken
