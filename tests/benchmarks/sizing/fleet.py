"""A fleet of replicas in SimPy: the product's policies with simulated time.

The product's own `BatchScheduler` decides which calls are joined. `FairQueue` follows the rules of the product's
`Admission`, without its futures and estimates, and without the slot that it keeps for other callers; the tests compare
the two.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import random
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import simpy

from calotype_server.engine.batching.pending import PendingCall, RequestSlot
from calotype_server.engine.batching.scheduler import BatchScheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

_SIGNATURE = "one size for all"


class Routing(StrEnum):
    """Which replica a new generation goes to."""

    ROUND_ROBIN = "round_robin"
    """In turn: one native client, whose channel does not know the load of the servers."""
    RANDOM = "random"
    """At random: the effect of many clients that each use round-robin on their own."""
    LEAST = "least"
    """To the replica with the fewest calls: a bridge."""


@dataclass(frozen=True)
class Model:
    """The time that a replica needs for each part of a generation, in seconds.

    Attributes:
        step_seconds: Pairs of rows per call, rising, and duration of such a call of the denoiser. Other durations are
            interpolated and extrapolated linearly.
        steps: Steps of a generation.
        rows: Rows of one generation in a call: 2 with guidance.
        between: Time from an answer to the next call, per generation in the batch: schedulers and taps share Python's
            lock.
        encoding: Time before the first step.
        decoding: Time after the last step.
        preview: Time from the end of a step until the caller has its preview.
        shared: Whether encoding and decoding block the device, as on a GPU. Otherwise they run in parallel, on cores
            that steps do not use.
    """

    step_seconds: tuple[tuple[int, float], ...]
    steps: int = 20
    rows: int = 2
    between: float = 0.0
    encoding: float = 0.0
    decoding: float = 0.0
    preview: float = 0.0
    shared: bool = True

    def seconds(self, rows: int) -> float:
        """Returns the duration of a call with this number of rows."""
        table = self.step_seconds
        if len(table) == 1 or rows <= table[0][0]:
            return table[0][1]
        index = next((i for i, (known, _) in enumerate(table) if known >= rows), len(table) - 1)
        (few, quick), (many, slow) = table[index - 1], table[index]
        return quick + (slow - quick) * (rows - few) / (many - few)

    def capacity(self, max_active: int, max_rows: int) -> float:
        """Returns the generations per second of a replica that is never idle, within a few per cent."""
        together = max(1, min(max_active, max_rows // self.rows))
        call = self.seconds(together * self.rows) + self.between * together
        around = self.encoding + self.decoding
        if self.shared:
            return 1 / (self.steps * call / together + around)
        # A slot makes no calls while it encodes or decodes.
        return min(together / (self.steps * call), max_active / (self.steps * call + around))


@dataclass(frozen=True)
class Fleet:
    """The servers.

    Attributes:
        replicas: Number of replicas.
        max_active: Maximum number of running generations per replica.
        max_rows: Maximum number of rows per call.
        max_queue: Maximum number of waiting generations per replica.
        routing: How to choose the replica of a new generation.
    """

    replicas: int
    max_active: int
    max_rows: int
    max_queue: float = 32
    routing: Routing = Routing.LEAST


@dataclass(eq=False)
class Request:
    """One generation and the times of its events in seconds; NaN for an event that did not happen.

    Attributes:
        arrived: The request was sent.
        caller: The caller that sent it.
        started: The request got a slot.
        first_preview: The caller received the first preview.
        finished: The image was complete.
        rejected: Whether the queue was full.
        step: Completed steps.
    """

    arrived: float
    caller: int = 0
    started: float = math.nan
    first_preview: float = math.nan
    finished: float = math.nan
    rejected: bool = False
    step: int = 0
    slot: RequestSlot = field(default_factory=lambda: RequestSlot(0), repr=False)


def parse_step_ms(table: str) -> tuple[tuple[int, float], ...]:
    """Parses `ROWS:MILLISECONDS,...` with rising rows, and returns pairs of rows and seconds.

    Raises:
        ValueError: The table has another form.
    """
    pairs = [pair.split(":") for pair in table.split(",")]
    made = tuple((int(rows), float(milliseconds) / 1e3) for rows, milliseconds in pairs)
    if any(few >= many for (few, _), (many, _) in itertools.pairwise(made)) or min(made)[0] < 1:
        raise ValueError(f"rows do not rise in {table!r}")
    if any(seconds <= 0 for _, seconds in made):
        raise ValueError(f"a step takes no time in {table!r}")
    return made


class FairQueue:
    """Start-time fair queueing, as in `generations.admission`: the smallest tag first, and the oldest of equal tags."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Any]] = []
        self._virtual_time = 0.0
        self._tags: dict[Any, float] = {}
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, item: Any, caller: Any, work: float) -> None:
        """Adds an item of size `work`."""
        tag = max(self._virtual_time, self._tags.get(caller, 0.0))
        self._tags[caller] = tag + work
        heapq.heappush(self._waiting, (tag, next(self._arrivals), item))

    def pop(self) -> Any:
        """Removes and returns the next item."""
        tag, _, item = heapq.heappop(self._waiting)
        self._virtual_time = max(self._virtual_time, tag)
        return item


class Replica:
    """One server: its queue, its slots, its device."""

    def __init__(self, env: simpy.Environment, model: Model, fleet: Fleet, on_left: Callable[[Replica], None]) -> None:
        self.calls = 0
        """Running and waiting generations."""
        self.batches = 0
        """Calls of the denoiser so far."""
        self._env = env
        self._model = model
        self._fleet = fleet
        self._on_left = on_left
        self._active = 0
        self._queue = FairQueue()
        self._scheduler = BatchScheduler(fleet.max_rows)
        self._call: Any = SimpleNamespace(signature=_SIGNATURE, rows=model.rows)
        self._by_slot: dict[RequestSlot, Request] = {}
        self._chores: deque[tuple[float, Callable[[], None]]] = deque()
        """Encodings and decodings that wait for the device."""
        self._woken = env.event()
        env.process(self._device())

    def enter(self, request: Request) -> None:
        """Accepts a request, or rejects it if the queue is full."""
        if self._active >= self._fleet.max_active and len(self._queue) >= self._fleet.max_queue:
            request.rejected = True
            return
        self.calls += 1
        self._queue.push(request, request.caller, self._model.steps)
        self._fill()

    def _fill(self) -> None:
        while len(self._queue) and self._active < self._fleet.max_active:
            self._active += 1
            request = self._queue.pop()
            request.started = self._env.now
            self._spend(self._model.encoding, functools.partial(self._arrive, [request]))

    def _spend(self, seconds: float, then: Callable[[], None]) -> None:
        """Encodes or decodes for `seconds`, on the device or beside it, then calls `then`."""
        if self._model.shared and seconds:
            self._chores.append((seconds, then))
            self._wake()
        else:
            self._after(seconds, then)

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        if seconds:
            self._env.timeout(seconds).callbacks.append(lambda _: then())
        else:
            then()

    def _arrive(self, requests: Iterable[Request]) -> None:
        """Submits the next call of each request, or decodes a request that has made its last call."""
        for request in requests:
            if request.step < self._model.steps:
                self._by_slot[request.slot] = request
                self._scheduler.arrive(PendingCall(request.slot, self._call, self._env.now))
            else:
                self._scheduler.stop_waiting_for(request.slot)
                self._spend(self._model.decoding, functools.partial(self._leave, request))
        self._wake()

    def _leave(self, request: Request) -> None:
        request.finished = self._env.now
        self._active -= 1
        self.calls -= 1
        self._fill()
        self._on_left(self)

    def _wake(self) -> None:
        if not self._woken.triggered:
            self._woken.succeed()

    def _device(self) -> Generator[simpy.Event]:
        env, model, scheduler = self._env, self._model, self._scheduler
        while True:
            if self._chores:
                seconds, then = self._chores.popleft()
                yield env.timeout(seconds)
                then()
                continue
            calls, deadline = scheduler.pick(env.now)
            if calls:
                started = env.now
                yield env.timeout(model.seconds(sum(pending.call.rows for pending in calls)))
                self.batches += 1
                scheduler.launched(calls, started, env.now)
                scheduler.computed(env.now)
                self._answer([pending.slot for pending in calls])
                continue
            self._woken = env.event()
            if deadline is None:
                yield self._woken
            else:
                yield self._woken | env.timeout(max(0.0, deadline - env.now) + 1e-9)

    def _answer(self, slots: Sequence[RequestSlot]) -> None:
        requests = [self._by_slot.pop(slot) for slot in slots]
        for request in requests:
            request.step += 1
            if request.step == 1:
                self._scheduler.note_look(request.slot)
                request.first_preview = self._env.now + self._model.preview
        self._after(self._model.between * len(requests), lambda: self._arrive(requests))


class _Router:
    def __init__(self, env: simpy.Environment, model: Model, fleet: Fleet, seed: int) -> None:
        self._routing = fleet.routing
        self._random = random.Random(seed)
        self._turn = itertools.count()
        self.replicas = [Replica(env, model, fleet, self._note) for _ in range(fleet.replicas)]
        self._order = itertools.count()
        self._heap = [(0, next(self._order), replica) for replica in self.replicas]

    def _note(self, replica: Replica) -> None:
        if self._routing is Routing.LEAST:
            heapq.heappush(self._heap, (replica.calls, next(self._order), replica))

    def route(self, request: Request) -> None:
        replica = self._pick()
        replica.enter(request)
        self._note(replica)

    def _pick(self) -> Replica:
        if self._routing is Routing.ROUND_ROBIN:
            return self.replicas[next(self._turn) % len(self.replicas)]
        if self._routing is Routing.RANDOM:
            return self._random.choice(self.replicas)
        while True:  # skips entries that are out of date
            calls, _, replica = heapq.heappop(self._heap)
            if calls == replica.calls:
                return replica


@dataclass(frozen=True)
class Outcome:
    """The result of a simulation.

    Attributes:
        requests: All requests, in the order of arrival.
        seconds: Time until the last request ended.
        batches: Calls of the denoiser, over all replicas.
    """

    requests: tuple[Request, ...]
    seconds: float
    batches: int


def poisson(rate: float, count: int, seed: int, callers: int = 1_000_000) -> list[Request]:
    """Returns requests with Poisson arrivals.

    Args:
        rate: Requests per second.
        count: Number of requests.
        seed: Seed of the random numbers.
        callers: Number of callers to draw from. With many callers, most send one request, and the fair queue becomes
            first come, first served.
    """
    chance = random.Random(seed)
    times = itertools.accumulate(chance.expovariate(rate) for _ in range(count))
    return [Request(time, chance.randrange(callers), slot=RequestSlot(number)) for number, time in enumerate(times)]


def simulate(model: Model, fleet: Fleet, requests: Sequence[Request], *, seed: int = 0) -> Outcome:
    """Simulates a fleet until the last request has ended.

    Args:
        model: Times of a generation.
        fleet: The replicas.
        requests: Requests in the order of arrival; their times are filled in.
        seed: Seed of `Routing.RANDOM`.
    """
    env = simpy.Environment()
    router = _Router(env, model, fleet, seed)

    def arrivals() -> Generator[simpy.Event]:
        for request in requests:
            yield env.timeout(max(0.0, request.arrived - env.now))
            router.route(request)

    env.process(arrivals())
    env.run()
    return Outcome(tuple(requests), env.now, sum(replica.batches for replica in router.replicas))
