"""The scheduler's decisions, on a simulated clock."""

import types
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from calotype_server.engine.batching.scheduler import BatchScheduler, PendingCall, RequestSlot

STEP = 0.1
WAIT = STEP / 4


class Simulation:
    """A scheduler with a simulated clock."""

    def __init__(self, max_rows=16):
        self.now = 0.0
        self.scheduler = BatchScheduler(max_rows)
        self.scheduler.observe(STEP)

    def arrive(self, slot, signature="a", rows=1):
        call: Any = types.SimpleNamespace(signature=signature, rows=rows)
        pending = PendingCall(slot, call, self.now)
        self.scheduler.arrive(pending)
        return pending

    def answer(self, *slots):
        for slot in slots:
            self.scheduler.expect(slot, self.now)

    def pick(self):
        """Returns the numbers of the requests whose calls run now."""
        calls, _ = self.scheduler.pick(self.now)
        return [pending.slot.number for pending in calls]

    def step(self, *slots, signature="a"):
        """Makes one step of all these requests, on time."""
        for slot in slots:
            self.arrive(slot, signature)
        assert len(self.pick()) == len(slots)
        self.answer(*slots)


@pytest.fixture
def simulation():
    """A simulation with enough rows for all requests of a test."""
    return Simulation()


def slots(count):
    """Returns `count` requests."""
    return [RequestSlot(number) for number in range(count)]


def test_a_single_request_does_not_wait(simulation):
    """The calls of a single request run at once, at every step."""
    (slot,) = slots(1)
    for _ in range(3):
        simulation.step(slot)


def test_a_batch_waits_for_expected_requests(simulation):
    """A batch waits for the requests that shared the last step, and runs when all have arrived."""
    a, b, c = slots(3)
    simulation.step(a, b, c)
    simulation.arrive(b)
    assert simulation.pick() == []
    simulation.arrive(a)
    assert simulation.pick() == []
    simulation.arrive(c)
    assert simulation.pick() == [1, 0, 2]


def test_waiting_is_bounded(simulation):
    """After a quarter of a step the batch runs without the missing request."""
    a, b = slots(2)
    simulation.step(a, b)
    simulation.arrive(a)
    calls, deadline = simulation.scheduler.pick(simulation.now)
    assert (calls, deadline) == ([], pytest.approx(WAIT))
    simulation.now += WAIT / 2
    assert simulation.pick() == []
    simulation.now = deadline
    assert simulation.pick() == [0]


def test_only_idle_time_of_the_device_counts(simulation):
    """The time that a call spends behind another batch does not count as waiting for expected requests."""
    a, b = slots(2)
    simulation.step(a)
    simulation.arrive(a)
    assert simulation.pick() == [0]
    simulation.arrive(b)
    simulation.now += STEP
    simulation.answer(a)
    assert simulation.pick() == []
    simulation.arrive(a)
    assert simulation.pick() == [1, 0]


def test_a_slow_request_delays_others_once(simulation):
    """A request that was late is not expected again until it has been on time once."""
    slow, quick = slots(2)
    simulation.step(slow, quick)
    simulation.arrive(quick)
    assert simulation.pick() == []
    simulation.now += WAIT
    assert simulation.pick() == [1]
    simulation.answer(quick)
    simulation.step(quick)  # It does not wait while the other is away.
    simulation.now += STEP
    simulation.arrive(slow)
    simulation.arrive(quick)
    assert simulation.pick() == [0, 1]
    simulation.answer(slow, quick)
    simulation.arrive(quick)
    assert simulation.pick() == [1]  # It does not wait after the other was late, either.
    simulation.arrive(slow)  # It is on time.
    simulation.answer(quick)
    simulation.arrive(quick)
    assert simulation.pick() == [0, 1]
    simulation.answer(slow, quick)
    simulation.arrive(quick)
    assert simulation.pick() == []


def test_a_request_that_left_is_not_expected(simulation):
    """After `stop_waiting_for`, the other requests run at once."""
    a, b = slots(2)
    simulation.step(a, b)
    simulation.arrive(a)
    assert simulation.pick() == []
    simulation.scheduler.stop_waiting_for(b)
    assert simulation.pick() == [0]


def test_a_full_batch_does_not_wait(simulation):
    """A batch that has no room for the expected call runs at once."""
    simulation.scheduler.limit_rows(5)
    a, b, c = slots(3)
    for slot in (a, b):
        simulation.arrive(slot, rows=2)
    assert simulation.pick() == [0, 1]
    simulation.answer(a, b)
    simulation.arrive(a, rows=2)
    assert simulation.pick() == []
    simulation.arrive(c, rows=2)
    assert simulation.pick() == [0, 2]


def test_requests_that_ran_queue_behind_waiting_ones():
    """With six requests and room for four, each request runs in two of any three batches."""
    simulation = Simulation(max_rows=4)
    requests = slots(6)
    for slot in requests:
        simulation.arrive(slot)
    turns = []
    for _ in range(6):
        picked = simulation.pick()
        turns += picked
        simulation.answer(*(requests[number] for number in picked))
        for number in picked:
            simulation.arrive(requests[number])
    assert turns == [number % 6 for number in range(24)]


def test_the_group_with_the_oldest_call_runs_first(simulation):
    """Groups of different sizes run in the order of their oldest calls."""
    a, b, c = slots(3)
    simulation.arrive(a, "small")
    simulation.arrive(b, "large")
    simulation.arrive(c, "small")
    assert simulation.pick() == [0, 2]
    assert simulation.pick() == [1]


def test_a_waiting_group_does_not_keep_the_device_idle(simulation):
    """While the older group waits for a request, a complete younger group runs."""
    a, b, c = slots(3)
    simulation.step(a, b)
    simulation.arrive(a)
    simulation.arrive(c, "other")
    assert simulation.pick() == [2]
    assert simulation.pick() == []


def test_alternating_signatures_are_predicted(simulation):
    """Two requests whose calls alternate between two signatures are joined in both."""
    a, b = slots(2)
    for signature in ("prompt", "negative", "prompt"):
        simulation.step(a, b, signature=signature)
    for signature in ("negative", "prompt"):
        simulation.arrive(a, signature)
        assert simulation.pick() == []
        simulation.arrive(b, signature)
        assert simulation.pick() == [0, 1]
        simulation.answer(a, b)


@pytest.mark.parametrize(("step", "wait"), [(0.001, 0.002), (0.1, 0.025), (10.0, 0.05)])
def test_the_wait_is_bounded(step, wait):
    """The longest wait is a quarter of a step, but 2 to 50 ms."""
    scheduler = BatchScheduler(4)
    scheduler.observe(step)
    assert scheduler.max_wait == pytest.approx(wait)


def test_the_wait_follows_the_step_time():
    """A slow first call, such as one that compiles, loses its influence after many steps."""
    scheduler = BatchScheduler(4)
    scheduler.observe(60.0)
    for _ in range(60):
        scheduler.observe(0.1)
    assert scheduler.max_wait == pytest.approx(0.025, rel=0.1)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests that arrive, end, pause and are withdrawn in any order."""

    outside, answered = Bundle("outside"), Bundle("answered")

    def __init__(self):
        super().__init__()
        self.simulation = Simulation(max_rows=5)
        self.number = 0
        self.waiting = set()

    @rule(target=outside)
    def open(self):
        self.number += 1
        return RequestSlot(self.number)

    @rule(
        slot=st.one_of(consumes(outside), consumes(answered)),
        signature=st.sampled_from("abc"),
        rows=st.integers(1, 7),
    )
    def arrive(self, slot, signature, rows):
        self.waiting.add(self.simulation.arrive(slot, signature, rows))

    @rule(slot=consumes(answered), target=outside)
    def stop_waiting_for(self, slot):
        self.simulation.scheduler.stop_waiting_for(slot)
        return slot

    @rule(seconds=st.sampled_from([0.0, WAIT / 3, WAIT, STEP]))
    def pass_time(self, seconds):
        self.simulation.now += seconds

    @rule(data=st.data())
    @precondition(lambda self: self.simulation.scheduler.waiting)
    def withdraw(self, data):
        pending = data.draw(st.sampled_from(self.simulation.scheduler.waiting))
        self.simulation.scheduler.withdraw(pending)
        self.waiting.remove(pending)

    @rule(data=st.data(), target=answered)
    @precondition(lambda self: self.simulation.scheduler.waiting)
    def run(self, data):
        """The device is free, and waits until the returned deadline."""
        waiting = list(self.simulation.scheduler.waiting)
        asked = self.simulation.now
        calls, deadline = self.simulation.scheduler.pick(asked)
        if not calls:
            assert asked < deadline <= asked + self.simulation.scheduler.max_wait
            self.simulation.now = deadline
            calls, _ = self.simulation.scheduler.pick(deadline)
        assert calls, "nothing runs after the deadline"
        assert len({pending.call.signature for pending in calls}) == 1
        assert sum(pending.call.rows for pending in calls) <= 5 or len(calls) == 1
        group = [pending for pending in waiting if pending.call.signature == calls[0].call.signature]
        assert calls == group[: len(calls)], "not the oldest of their group"
        for pending in waiting[: waiting.index(calls[0])]:
            limit = pending.device_free_since + self.simulation.scheduler.max_wait
            assert self.simulation.now < limit, "overtaken by a younger call"
        self.waiting.difference_update(calls)
        for pending in calls:
            if data.draw(st.booleans()):
                self.simulation.answer(pending.slot)
        return multiple(*(pending.slot for pending in calls))

    @invariant()
    def no_call_is_lost(self):
        assert set(self.simulation.scheduler.waiting) == self.waiting


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase


def test_no_call_starves():
    """A call of another group runs after at most one batch, although the other group always has waiting calls."""
    simulation = Simulation(max_rows=2)
    patient, *others = slots(7)
    simulation.arrive(others[0], "b")
    simulation.arrive(patient, "a")
    for slot in others[1:]:
        simulation.arrive(slot, "b")
    batches = 0
    while 0 not in (picked := simulation.pick()):
        batches += 1
        simulation.now += STEP
        for number in picked:
            simulation.answer(others[number - 1])
            simulation.arrive(others[number - 1], "b")
        assert batches <= 1
