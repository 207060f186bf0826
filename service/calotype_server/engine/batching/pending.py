"""A call that waits for the device, and the state of the request that makes it."""

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

__all__ = ["PendingCall", "RequestSlot"]


@dataclass(eq=False, slots=True)
class PendingCall:
    """A call that waits for its answer.

    Attributes:
        slot: The request that makes it.
        call: The arguments.
        arrived: Time of arrival in seconds.
        device_free_since: Time in seconds since which the device could have run it; infinite while it was busy.
        future: Receives the answer.
        apart: Only calls with an equal value may be joined, even if their signatures are equal.
        batch_rows: Rows that were computed together with it, its own included. Set with the answer.
        context: Of the thread that waits, so that lines logged for the call carry the request's ids.
    """

    slot: RequestSlot
    call: Call
    arrived: float
    device_free_since: float = math.inf
    future: Future[Any] = field(default_factory=Future)
    apart: Hashable = None
    batch_rows: int = 0
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @property
    def group(self) -> Hashable:
        """Calls of equal groups can be joined."""
        return self.call.signature if self.apart is None else (self.call.signature, self.apart)

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
        number: Identifies the request in records of batches; an older request has a smaller number.
        rows: Rows of its last call.
        looked: Whether it has finished its first step, so that its caller can see a preview.
        expected: Group of the call that it should make next, while others wait for it.
        on_time: Whether it made its last call within `max_wait` of the time when the answer before was computed.
        answer: Its last answered call; None while a call waits, and before the first.
        computed_at: Time in seconds when that answer was computed; None until then.
        last_group: Group of its last call.
        next_groups: Maps a group to the one that followed it: with classifier-free guidance in two calls, two groups
            alternate if the prompts differ in length.
    """

    number: int
    rows: int = 0
    looked: bool = False
    expected: Hashable | None = None
    on_time: bool = True
    answer: PendingCall | None = None
    computed_at: float | None = None
    last_group: Hashable | None = None
    next_groups: dict[Hashable, Hashable] = field(default_factory=dict)

    def note_call(self, pending: PendingCall, max_wait: float) -> None:
        """Records that the request made a call."""
        self.expected = None
        self.on_time = self.computed_at is None or pending.arrived - self.computed_at <= max_wait
        self.answer = self.computed_at = None
        if self.last_group is not None:
            self.next_groups[self.last_group] = pending.group
        self.last_group, self.rows = pending.group, pending.call.rows

    def note_answer(self, pending: PendingCall) -> bool:
        """Records that the request got the answer to its call; returns whether to expect its next call."""
        self.answer = pending
        if self.on_time:
            self.expected = self.next_groups.get(self.last_group, self.last_group)
        return self.on_time

    def note_computed(self, pending: PendingCall, now: float) -> None:
        """Records that the answer to a call was computed, which matters until the request makes its next call."""
        if self.answer is pending:
            self.computed_at = now

    def note_look(self) -> None:
        """Records that the request has finished its first step."""
        self.looked = True

    def stop_expecting(self) -> None:
        """Records that nothing waits for the request's next call."""
        self.expected = None
