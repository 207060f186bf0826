"""A fleet of replicas in SimPy: the product's policies, on a clock that costs nothing.

Which calls are joined is decided by the product's own `BatchScheduler`. Who starts next is decided by the rules of
`Admission`, whose futures and estimates a simulation has no use for; the tests compare the two.
"""

from __future__ import annotations

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

from calotype_server.engine.batching.scheduler import BatchScheduler, PendingCall, RequestSlot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_SIGNATURE = "one size for all"


class Routing(StrEnum):
    """Which replica a new generation goes to."""

    ROUND_ROBIN = "round_robin"
    """In turn: one native client, whose channel does not know how busy anybody is."""
    RANDOM = "random"
    """What it comes to when many clients go round, each by itself."""
    LEAST = "least"
    """To the one with the fewest calls: a bridge."""


@dataclass(frozen=True)
class Model:
    """What a replica needs for a generation, in seconds.

    Attributes:
        step_seconds: Rows computed together, rising, and what such a call of the denoiser takes. Straight lines lie
            between them, and go on beyond them.
        steps: Of a generation.
        rows: Of one generation in a call: 2 with guidance.
        between: From an answer to the next call, for each of those that were joined: schedulers and taps share
            Python's lock.
        encoding: Before the first step.
        decoding: After the last one.
        preview: From the end of a step to its preview at the caller.
        shared: Whether encoding and decoding keep the device from computing steps: so on a GPU. Otherwise they are
            done beside, by cores that steps do not use.
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
        """Returns what a call of so many rows takes."""
        table = self.step_seconds
        if len(table) == 1 or rows <= table[0][0]:
            return table[0][1]
        index = next((i for i, (known, _) in enumerate(table) if known >= rows), len(table) - 1)
        (few, quick), (many, slow) = table[index - 1], table[index]
        return quick + (slow - quick) * (rows - few) / (many - few)

    def capacity(self, max_active: int, max_rows: int) -> float:
        """Returns the generations per second of a replica that always has enough to do, within some per cent."""
        together = max(1, min(max_active, max_rows // self.rows))
        call = self.seconds(together * self.rows) + self.between * together
        around = self.encoding + self.decoding
        if self.shared:
            return 1 / (self.steps * call / together + around)
        # A slot that encodes or decodes makes no calls meanwhile.
        return min(together / (self.steps * call), max_active / (self.steps * call + around))


@dataclass(frozen=True)
class Fleet:
    """The servers.

    Attributes:
        replicas: How many.
        max_active: Generations at work at once, of each.
        max_rows: Rows computed together at most, by each.
        max_queue: Generations that wait at most, of each.
        routing: Which of them a new one goes to.
    """

    replicas: int
    max_active: int
    max_rows: int
    max_queue: float = 32
    routing: Routing = Routing.LEAST


@dataclass(eq=False)
class Request:
    """One generation, and the times at which things happened to it, in seconds; NaN for what did not.

    Attributes:
        arrived: It was sent.
        caller: Whose it is.
        started: It had a slot.
        first_preview: The caller saw something.
        finished: The picture was there.
        refused: Whether the queue was full.
        step: Steps done.
    """

    arrived: float
    caller: int = 0
    started: float = math.nan
    first_preview: float = math.nan
    finished: float = math.nan
    refused: bool = False
    step: int = 0
    slot: RequestSlot = field(default_factory=lambda: RequestSlot(0), repr=False)


def parse_step_ms(table: str) -> tuple[tuple[int, float], ...]:
    """Takes `ROWS:MILLISECONDS,...`, rows rising, and returns seconds.

    Raises:
        ValueError: It is something else.
    """
    pairs = [pair.split(":") for pair in table.split(",")]
    made = tuple((int(rows), float(milliseconds) / 1e3) for rows, milliseconds in pairs)
    if any(few >= many for (few, _), (many, _) in itertools.pairwise(made)) or min(made)[0] < 1:
        raise ValueError(f"rows do not rise in {table!r}")
    if any(seconds <= 0 for _, seconds in made):
        raise ValueError(f"a step takes no time in {table!r}")
    return made


class FairQueue:
    """Start-time fair queueing, as in `generations.admission`: the smallest tag first, of equal ones the older."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Any]] = []
        self._virtual_time = 0.0
        self._tags: dict[Any, float] = {}
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, item: Any, caller: Any, work: float) -> None:
        """Adds what takes `work`."""
        tag = max(self._virtual_time, self._tags.get(caller, 0.0))
        self._tags[caller] = tag + work
        heapq.heappush(self._waiting, (tag, next(self._arrivals), item))

    def pop(self) -> Any:
        """Takes out what is next."""
        tag, _, item = heapq.heappop(self._waiting)
        self._virtual_time = max(self._virtual_time, tag)
        return item


class Replica:
    """One server: its queue, its slots, its device."""

    def __init__(self, env: simpy.Environment, model: Model, fleet: Fleet, on_left: Callable[[Replica], None]) -> None:
        self.calls = 0
        """Generations that it has, those that wait included."""
        self.batches = 0
        """Calls of the denoiser."""
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
        """Takes a request, or refuses it."""
        if self._active >= self._fleet.max_active and len(self._queue) >= self._fleet.max_queue:
            request.refused = True
            return
        self.calls += 1
        self._queue.push(request, request.caller, self._model.steps)
        self._fill()

    def _fill(self) -> None:
        while len(self._queue) and self._active < self._fleet.max_active:
            self._active += 1
            request = self._queue.pop()
            request.started = self._env.now
            self._spend(self._model.encoding, lambda request=request: self._arrive([request]))

    def _spend(self, seconds: float, then: Callable[[], None]) -> None:
        """Encodes or decodes."""
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
        """Requests come with their next calls, or have made their last ones."""
        for request in requests:
            if request.step < self._model.steps:
                self._by_slot[request.slot] = request
                self._scheduler.arrive(PendingCall(request.slot, self._call, self._env.now))
            else:
                self._scheduler.stop_waiting_for(request.slot)
                self._spend(self._model.decoding, lambda request=request: self._leave(request))
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

    def _device(self) -> Iterator[simpy.Event]:
        env, model, scheduler = self._env, self._model, self._scheduler
        while True:
            if self._chores:
                seconds, then = self._chores.popleft()
                yield env.timeout(seconds)
                then()
                continue
            calls, deadline = scheduler.pick(env.now)
            if calls:
                seconds = model.seconds(sum(pending.call.rows for pending in calls))
                yield env.timeout(seconds)
                self.batches += 1
                scheduler.observe(seconds)
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
            self._scheduler.expect(request.slot, self._env.now)
            request.step += 1
            if request.step == 1:
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
        while True:  # entries from before something came or left are out of date
            calls, _, replica = heapq.heappop(self._heap)
            if calls == replica.calls:
                return replica


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        requests: All, in the order of their arrival.
        seconds: Until the last one had ended.
        batches: Calls of the denoiser, over all replicas.
    """

    requests: tuple[Request, ...]
    seconds: float
    batches: int


def poisson(rate: float, count: int, seed: int, callers: int = 1_000_000) -> list[Request]:
    """Returns requests that come by chance.

    Args:
        rate: Per second.
        count: How many.
        seed: Of the chance.
        callers: Among whom they are drawn. Who comes once waits as everybody does: first come, first served.
    """
    chance = random.Random(seed)
    times = itertools.accumulate(chance.expovariate(rate) for _ in range(count))
    return [Request(time, chance.randrange(callers), slot=RequestSlot(number)) for number, time in enumerate(times)]


def simulate(model: Model, fleet: Fleet, requests: Sequence[Request], *, seed: int = 0) -> Outcome:
    """Lets a fleet serve requests until the last one has ended.

    Args:
        model: What replicas compute.
        fleet: The replicas.
        requests: In the order of their arrival; they are filled in.
        seed: Of `Routing.RANDOM`.
    """
    env = simpy.Environment()
    router = _Router(env, model, fleet, seed)

    def arrivals() -> Iterator[simpy.Event]:
        for request in requests:
            yield env.timeout(max(0.0, request.arrived - env.now))
            router.route(request)

    env.process(arrivals())
    env.run()
    return Outcome(tuple(requests), env.now, sum(replica.batches for replica in router.replicas))
