"""A device, its thread and requests on a virtual clock, around the real scheduler of calls."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from calotype_server.engine.batching.pending import PendingCall, RequestSlot
from calotype_server.engine.batching.scheduler import BatchScheduler
from calotype_server.types import Schedule

__all__ = ["STEP", "WAIT", "Request", "Simulation", "VirtualDevice"]

STEP = 0.1
"""Seconds of a step in a `Simulation`."""

WAIT = STEP / 4
"""Longest wait for expected requests in a `Simulation`."""


class Simulation:
    """A scheduler with a simulated clock, and a device that computes a batch during its launch."""

    def __init__(self, max_rows=16, schedule=Schedule.FIRST_LOOK):
        self.now = 0.0
        self.scheduler = BatchScheduler(max_rows, schedule)
        self.scheduler.observe(STEP)
        self.running = {}

    def arrive(self, slot, signature="a", rows=1):
        call: Any = SimpleNamespace(signature=signature, rows=rows)
        pending = PendingCall(slot, call, self.now)
        self.scheduler.arrive(pending)
        return pending

    def answer(self, *slots):
        """Answers the calls of these requests that were picked."""
        calls = [self.running.pop(slot) for slot in slots]
        self.scheduler.launched(calls, self.now - STEP, self.now)
        self.scheduler.computed(self.now)
        for pending in calls:
            pending.answer(None, 0)

    def take(self):
        """Returns the calls that run now."""
        calls, _ = self.scheduler.pick(self.now)
        self.running |= {pending.slot: pending for pending in calls}
        return calls

    def pick(self):
        """Returns the numbers of the requests whose calls run now."""
        return [pending.slot.number for pending in self.take()]

    def step(self, *slots, signature="a"):
        """Makes one step of all these requests, on time."""
        for slot in slots:
            self.arrive(slot, signature)
        assert len(self.pick()) == len(slots)
        self.answer(*slots)


@dataclass(eq=False)
class Request:
    """A request and its fate. Times are in seconds.

    Attributes:
        number: Its number; smaller numbers are older.
        steps: Steps that it takes.
        arrives: Time of its first call.
        rows: Rows of each call.
        signature: Signature of each call.
        synchronises: Whether it waits until an answer is computed, as pipelines with some schedulers do.
        host: Time from an answer to its next call; a function of the step that is done, or a number.
        looked_at: Time when its first step was computed.
        ended_at: Time when its last step was computed.
    """

    number: int
    steps: int = 20
    arrives: float = 0.0
    rows: int = 2
    signature: str = "a"
    synchronises: bool = False
    host: object = 0.0
    looked_at: float | None = None
    ended_at: float | None = None
    done: int = 0
    cancelled: bool = False
    pending: PendingCall | None = None
    slot: RequestSlot = field(init=False)

    def __post_init__(self):
        self.slot = RequestSlot(self.number)

    def host_seconds(self):
        """Returns the time to the next call."""
        return self.host(self.done) if callable(self.host) else self.host


class VirtualDevice:
    """Runs requests to their end, as the device thread does.

    Args:
        max_rows: Most rows of a batch.
        schedule: Order of the requests.
        step: Seconds that the device computes a batch, whatever its size.
        launch: Seconds to launch a batch; None for a CPU, which computes during the launch.

    Attributes:
        batches: Start of the computation, end, and requests of each batch.
        longest_wait_while_idle: Longest time in seconds for which a call waited while the device had nothing to do.
    """

    def __init__(self, *, max_rows, schedule=Schedule.FIRST_LOOK, step=1.0, launch=None):
        self.scheduler = BatchScheduler(max_rows, schedule)
        self.scheduler.observe(step)
        self.now = 0.0
        self.batches = []
        self.longest_wait_while_idle = 0.0
        self._step = step
        self._launch = launch
        self._free_at = 0.0
        self._in_flight = []
        self._launching = False
        self._events = []
        self._order = itertools.count()
        self._wake = None

    def at(self, time, function):
        """Calls a function at a time."""
        heapq.heappush(self._events, (time, next(self._order), function))

    def run(self, requests):
        """Runs these requests until all are done or cancelled."""
        for request in requests:
            self.at(request.arrives, lambda request=request: self._call(request))
        while self._events:
            self.now, _, function = heapq.heappop(self._events)
            assert self.now < 1e5, "no end"
            function()
            if not self._events or self._events[0][0] > self.now:
                self._device_thread()
        assert not self.scheduler.waiting, "a call was never answered"
        return self

    def cancel(self, request):
        """Cancels a request, as its session does."""
        request.cancelled = True
        self.scheduler.stop_waiting_for(request.slot)
        if request.pending is not None:
            self.scheduler.withdraw(request.pending)
            request.pending.fail(RuntimeError("cancelled"))

    def mean_rows(self):
        """Returns the mean number of rows of a batch."""
        return sum(sum(each.rows for each in requests) for _, _, requests in self.batches) / len(self.batches)

    @property
    def idle(self):
        """Seconds between the first and the last computation in which the device computed nothing."""
        busy = sum(end - start for start, end, _ in self.batches)
        return self.batches[-1][1] - self.batches[0][0] - busy

    def _call(self, request):
        if request.cancelled:
            return
        call: Any = SimpleNamespace(signature=request.signature, rows=request.rows, request=request)
        request.pending = PendingCall(request.slot, call, self.now)
        self.scheduler.arrive(request.pending)

    def _device_thread(self):
        while self._in_flight and self._in_flight[0] <= self.now:
            self._in_flight.pop(0)
            self.scheduler.computed(self.now)
        if self._launching:
            return
        calls, wake_at = self.scheduler.pick(self.now)
        if calls:
            self._launching = True
            started = self.now
            seconds = self._step if self._launch is None else self._launch
            self.at(self.now + seconds, lambda: self._launched(calls, started))
            return
        times = [] if wake_at is None else [wake_at]
        if self.scheduler.busy:
            times.append(self.now + self.scheduler.max_wait / 4)
        if times and (self._wake is None or self._wake <= self.now or min(times) < self._wake):
            self._wake = min(times)
            self.at(self._wake, lambda: None)

    def _launched(self, calls, started):
        self._launching = False
        idle_since = max(self._free_at, min(pending.arrived for pending in calls))
        self.longest_wait_while_idle = max(self.longest_wait_while_idle, started - idle_since)
        requests = [pending.call.request for pending in calls]
        if self._launch is None:
            begin, end = started, self.now
        else:
            begin = max(self._free_at, started)
            end = max(begin + self._step, self.now)
        self._free_at = end
        self.batches.append((begin, end, requests))
        self.scheduler.launched(calls, started, self.now)
        self._in_flight.append(end)
        if self._launch is None:
            self._in_flight.pop()
            self.scheduler.computed(self.now)
        for pending, request in zip(calls, requests, strict=True):
            pending.answer(None, 0)
            request.pending = None
            back = end if request.synchronises else self.now
            self.at(back, lambda request=request, end=end: self._returned(request, end))

    def _returned(self, request, computed_at):
        if request.cancelled:
            return
        request.done += 1
        if request.done == 1:
            request.looked_at = computed_at
            self.scheduler.note_look(request.slot)
        if request.done == request.steps:
            request.ended_at = computed_at
            self.scheduler.stop_waiting_for(request.slot)
        else:
            self.at(self.now + request.host_seconds(), lambda: self._call(request))
