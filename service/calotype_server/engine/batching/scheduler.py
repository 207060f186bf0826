"""Decides which waiting calls run next. It has no threads and no clock: callers pass the current time in.

Calls that can be joined form a group, from which one batch runs at a time. A batch is *ready* when waiting longer
gains nothing: all requests that are expected in it have arrived, or no further call would fit, or the idle device has
waited for `max_wait`. `Schedule` decides which calls come first if not all fit:

- `FIRST_LOOK`: a request that has not finished its first step, then the oldest request. The most urgent request chooses
  the group, and the group's most urgent requests fill the batch. A batch waits for an expected request that is more
  urgent than one of its own; otherwise two requests without room for both would take turns. After 16 first steps in a
  row that others wait for, first steps alternate with theirs, so an endless series of new requests cannot stop anyone.
- `FIFO`: the oldest request, in the same way.
- `FAIR`: the oldest call. A request that just ran is therefore behind all that wait, so requests take turns.

A request is expected only between an answer and its next call, and only if it was on time for the last step. A slow
request therefore delays the others by `max_wait` once, not at every step.

A GPU computes a batch after it was launched, and its answers are given at the launch. At most two batches are launched
and not computed; after an error in a batch, its parts may exceed that for a moment. The second one is launched when the
first should be almost done (`launches`): until then, waiting calls can be withdrawn, and more urgent ones may arrive.
A request is late if it calls later than `max_wait` after its last answer was *computed*: some pipelines wait for that,
and others do not. Waiting for expected requests costs nothing as long as the device computes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from calotype_server.engine.batching.launches import Launches
from calotype_server.engine.batching.pending import PendingCall, RequestSlot
from calotype_server.engine.batching.urgency import Urgency
from calotype_server.types import Schedule

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

__all__ = ["BatchScheduler"]

_SHARE_OF_STEP = 0.25
_MIN_WAIT_SECONDS = 0.002
_MAX_WAIT_SECONDS = 0.05
_NEWEST_WEIGHT = 0.2
"""Weight of the newest step in the moving average of step times."""


class BatchScheduler:
    """Keeps the waiting calls, the launched batches and the expected requests. Not thread-safe.

    Args:
        max_rows: Most rows to run at once, from 1. A call with more rows than that runs alone.
        schedule: Which calls come first.
    """

    def __init__(self, max_rows: int, schedule: Schedule = Schedule.FIRST_LOOK) -> None:
        self._max_rows = max_rows
        self._urgency = None if schedule is Schedule.FAIR else Urgency(schedule)
        self._waiting: list[PendingCall] = []
        self._expected: set[RequestSlot] = set()
        self._launches = Launches()
        self._idle_since: float | None = None
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
    def busy(self) -> bool:
        """Whether the device computes a batch, so that `computed` will be called."""
        return self._launches.busy

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
        slot.note_call(pending, self.max_wait)
        self._waiting.append(pending)

    def launched(self, calls: Sequence[PendingCall], started: float, now: float) -> None:
        """Records that a batch was launched between `started` and `now`.

        Its calls get their answers, except those that are settled already, and their requests may call again soon.
        """
        self._launches.add(calls, started, now)
        for pending in calls:
            if not pending.future.done() and pending.slot.note_answer(pending):
                self._expected.add(pending.slot)

    def computed(self, now: float) -> float:
        """Records that the device has computed the oldest launched batch; returns the seconds that it took."""
        calls, seconds = self._launches.finish(now)
        self.observe(seconds)
        for pending in calls:
            pending.slot.note_computed(pending, now)
        return seconds

    def note_look(self, slot: RequestSlot) -> None:
        """Records that a request has finished its first step."""
        slot.note_look()

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
        """Removes and returns the calls to launch now.

        Returns:
            The calls, most urgent first, and None; or no calls, and the time by which to ask again. Ask earlier after
            any other change; if the time is None, only then.
        """
        if not self._waiting:
            self._idle_since = None
            return [], None
        if self._launches.full:
            return [], None
        if now < (due := self._launches.next_due()):
            return [], due
        return self._pick_oldest_call(now) if self._urgency is None else self._pick_most_urgent(now, self._urgency)

    def _pick_most_urgent(self, now: float, urgency: Urgency) -> tuple[list[PendingCall], float | None]:
        if self._idle_since is None and not self.busy:
            self._idle_since = now
        limit = math.inf if self._idle_since is None else self._idle_since + self.max_wait
        while True:
            batch = self._most_urgent_batch(urgency)
            calls = [each for each in batch if isinstance(each, PendingCall)]
            if len(calls) == len(batch):
                self._remove(calls)
                urgency.note_batch(calls, self._waiting)
                return calls, None
            if now < limit:
                return [], None if math.isinf(limit) else limit
            for each in batch:
                if isinstance(each, RequestSlot):
                    self.stop_waiting_for(each)

    def _most_urgent_batch(self, urgency: Urgency) -> list[PendingCall | RequestSlot]:
        """Returns the batch that would run if the expected requests had arrived; they stand for their calls."""
        entries: list[tuple[tuple[bool, int], Hashable, int, PendingCall | RequestSlot]] = [
            *((urgency.rank(each.slot), each.group, each.call.rows, each) for each in self._waiting),
            *((urgency.rank(slot), slot.expected, slot.rows, slot) for slot in self._expected),
        ]
        entries.sort(key=lambda entry: entry[0])
        _, first, room = entries[0][:3]
        room = max(room, self._max_rows)
        batch: list[PendingCall | RequestSlot] = []
        for _, other, rows, each in entries:
            if other == first and rows <= room:
                batch.append(each)
                room -= rows
        return batch

    def _pick_oldest_call(self, now: float) -> tuple[list[PendingCall], float | None]:
        groups: dict[Hashable, list[PendingCall]] = {}
        for pending in self._waiting:
            groups.setdefault(pending.group, []).append(pending)
            if not self.busy:
                pending.offer(now)
        deadline = math.inf
        for key, group in groups.items():  # The group with the oldest call comes first.
            limit = group[0].device_free_since + self.max_wait
            missing = [slot for slot in self._expected if slot.expected == key]
            if missing and now >= limit:
                for slot in missing:
                    self.stop_waiting_for(slot)
                missing = []
            room = self._max_rows - sum(pending.call.rows for pending in group)
            if all(slot.rows > room for slot in missing):
                return self._take(group), None
            deadline = min(deadline, limit)
        return [], None if math.isinf(deadline) else deadline

    def _take(self, group: list[PendingCall]) -> list[PendingCall]:
        rows = 0
        taken: list[PendingCall] = []
        for pending in group:
            rows += pending.call.rows
            if taken and rows > self._max_rows:
                break
            taken.append(pending)
        self._remove(taken)
        return taken

    def _remove(self, taken: Sequence[PendingCall]) -> None:
        self._waiting = [pending for pending in self._waiting if pending not in taken]
        self._idle_since = None
