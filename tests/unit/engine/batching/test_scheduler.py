"""The policy, on a clock that the tests turn."""

import types

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from calotype_server.engine.batching.scheduler import BatchScheduler, PendingCall, RequestSlot

STEP = 0.1
WAIT = STEP / 4


class Table:
    """A rendezvous with a clock."""

    def __init__(self, max_rows=16):
        self.now = 0.0
        self.rendezvous = BatchScheduler(max_rows)
        self.rendezvous.observe(STEP)

    def arrive(self, seat, signature="a", rows=1):
        ticket = PendingCall(seat, types.SimpleNamespace(signature=signature, rows=rows), self.now)
        self.rendezvous.arrive(ticket)
        return ticket

    def answer(self, *seats):
        for seat in seats:
            self.rendezvous.expect(seat, self.now)

    def pick(self):
        """Numbers of the seats whose calls run now."""
        tickets, _ = self.rendezvous.pick(self.now)
        return [ticket.seat.number for ticket in tickets]

    def step(self, *seats, signature="a"):
        """One step of all of them, on time."""
        for seat in seats:
            self.arrive(seat, signature)
        assert len(self.pick()) == len(seats)
        self.answer(*seats)


@pytest.fixture
def table():
    """With room for everybody."""
    return Table()


def seats(count):
    """That many requests."""
    return [RequestSlot(number) for number in range(count)]


def test_nobody_is_waited_for_by_one_alone(table):
    """A single request goes at once, at every step."""
    (seat,) = seats(1)
    for _ in range(3):
        table.step(seat)


def test_the_expected_are_waited_for(table):
    """Who shared the last step is waited for, and the batch goes when the last one is there."""
    a, b, c = seats(3)
    table.step(a, b, c)
    table.arrive(b)
    assert table.pick() == []
    table.arrive(a)
    assert table.pick() == []
    table.arrive(c)
    assert table.pick() == [1, 0, 2]


def test_waiting_has_an_end(table):
    """After a quarter of a step the batch goes without the one that is missing."""
    a, b = seats(2)
    table.step(a, b)
    table.arrive(a)
    tickets, deadline = table.rendezvous.pick(table.now)
    assert (tickets, deadline) == ([], pytest.approx(WAIT))
    table.now += WAIT / 2
    assert table.pick() == []
    table.now = deadline
    assert table.pick() == [0]


def test_the_device_must_have_waited(table):
    """Time that a call spent behind another batch does not count: the others have just got their answers."""
    a, b = seats(2)
    table.step(a)
    table.arrive(a)
    assert table.pick() == [0]
    table.arrive(b)
    table.now += STEP
    table.answer(a)
    assert table.pick() == []
    table.arrive(a)
    assert table.pick() == [1, 0]


def test_a_straggler_costs_one_wait(table):
    """It is not expected again before it has been on_time once more."""
    slow, quick = seats(2)
    table.step(slow, quick)
    table.arrive(quick)
    assert table.pick() == []
    table.now += WAIT
    assert table.pick() == [1]
    table.answer(quick)
    table.step(quick)  # not a single further wait while the other is away
    table.now += STEP
    table.arrive(slow)
    table.arrive(quick)
    assert table.pick() == [0, 1]
    table.answer(slow, quick)
    table.arrive(quick)
    assert table.pick() == [1]  # nor after it came late
    table.arrive(slow)  # on time
    table.answer(quick)
    table.arrive(quick)
    assert table.pick() == [0, 1]
    table.answer(slow, quick)
    table.arrive(quick)
    assert table.pick() == []


def test_who_has_left_is_not_expected(table):
    """The last step, a cancel, or the end of the request is told, and the others go on at once."""
    a, b = seats(2)
    table.step(a, b)
    table.arrive(a)
    assert table.pick() == []
    table.rendezvous.stop_waiting_for(b)
    assert table.pick() == [0]


def test_nobody_is_waited_for_without_room(table):
    """When no further call fits, waiting gains nothing."""
    table.rendezvous.max_rows = 5
    a, b, c = seats(3)
    for seat in (a, b):
        table.arrive(seat, rows=2)
    assert table.pick() == [0, 1]
    table.answer(a, b)
    table.arrive(a, rows=2)
    assert table.pick() == []
    table.arrive(c, rows=2)
    assert table.pick() == [0, 2]


def test_those_that_ran_go_behind_those_that_wait():
    """Six requests and room for four: everybody has two of any three turns."""
    table = Table(max_rows=4)
    everybody = seats(6)
    for seat in everybody:
        table.arrive(seat)
    turns = []
    for _ in range(6):
        picked = table.pick()
        turns += picked
        table.answer(*(everybody[number] for number in picked))
        for number in picked:
            table.arrive(everybody[number])
    assert turns == [number % 6 for number in range(24)]


def test_the_group_with_the_oldest_call_goes_first(table):
    """Sizes take turns, in the order of arrival."""
    a, b, c = seats(3)
    table.arrive(a, "small")
    table.arrive(b, "large")
    table.arrive(c, "small")
    assert table.pick() == [0, 2]
    assert table.pick() == [1]


def test_a_group_that_waits_does_not_keep_the_device_idle(table):
    """While the older group waits for somebody, a younger one that is complete goes."""
    a, b, c = seats(3)
    table.step(a, b)
    table.arrive(a)
    table.arrive(c, "other")
    assert table.pick() == [2]
    assert table.pick() == []


def test_a_request_is_expected_where_it_went_before(table):
    """Guidance in two calls alternates between two signatures; the two requests stay together in both."""
    a, b = seats(2)
    for signature in ("prompt", "negative", "prompt"):
        table.step(a, b, signature=signature)
    for signature in ("negative", "prompt"):
        table.arrive(a, signature)
        assert table.pick() == []
        table.arrive(b, signature)
        assert table.pick() == [0, 1]
        table.answer(a, b)


@pytest.mark.parametrize(("step", "wait"), [(0.001, 0.002), (0.1, 0.025), (10.0, 0.05)])
def test_the_wait_is_bounded(step, wait):
    """A quarter of a step, but from 2 to 50 ms."""
    rendezvous = BatchScheduler(4)
    rendezvous.observe(step)
    assert rendezvous.max_wait == pytest.approx(wait)


def test_the_wait_follows_the_steps():
    """A slow first call, as that of a compiler, is forgotten."""
    rendezvous = BatchScheduler(4)
    rendezvous.observe(60.0)
    for _ in range(60):
        rendezvous.observe(0.1)
    assert rendezvous.max_wait == pytest.approx(0.025, rel=0.1)


class RendezvousMachine(RuleBasedStateMachine):
    """Requests that come, go, dawdle and vanish in any order."""

    outside, answered = Bundle("outside"), Bundle("answered")

    def __init__(self):
        super().__init__()
        self.table = Table(max_rows=5)
        self.number = 0
        self.waiting = set()

    @rule(target=outside)
    def open(self):
        self.number += 1
        return RequestSlot(self.number)

    @rule(
        seat=st.one_of(consumes(outside), consumes(answered)),
        signature=st.sampled_from("abc"),
        rows=st.integers(1, 7),
    )
    def arrive(self, seat, signature, rows):
        self.waiting.add(self.table.arrive(seat, signature, rows))

    @rule(seat=consumes(answered), target=outside)
    def stop_waiting_for(self, seat):
        self.table.rendezvous.stop_waiting_for(seat)
        return seat

    @rule(seconds=st.sampled_from([0.0, WAIT / 3, WAIT, STEP]))
    def pass_time(self, seconds):
        self.table.now += seconds

    @rule(data=st.data())
    @precondition(lambda self: self.table.rendezvous.waiting)
    def withdraw(self, data):
        ticket = data.draw(st.sampled_from(self.table.rendezvous.waiting))
        self.table.rendezvous.withdraw(ticket)
        self.waiting.remove(ticket)

    @rule(data=st.data(), target=answered)
    @precondition(lambda self: self.table.rendezvous.waiting)
    def run(self, data):
        """The device comes free, and waits for as long as it is told to."""
        waiting = list(self.table.rendezvous.waiting)
        asked = self.table.now
        tickets, deadline = self.table.rendezvous.pick(asked)
        if not tickets:
            assert asked < deadline <= asked + self.table.rendezvous.max_wait
            self.table.now = deadline
            tickets, _ = self.table.rendezvous.pick(deadline)
        assert tickets, "nothing runs after the deadline"
        assert len({ticket.call.signature for ticket in tickets}) == 1
        assert sum(ticket.call.rows for ticket in tickets) <= 5 or len(tickets) == 1
        group = [ticket for ticket in waiting if ticket.call.signature == tickets[0].call.signature]
        assert tickets == group[: len(tickets)], "not the oldest of their group"
        for ticket in waiting[: waiting.index(tickets[0])]:
            assert self.table.now < ticket.offered + self.table.rendezvous.max_wait, "passed by a younger one"
        self.waiting.difference_update(tickets)
        for ticket in tickets:
            if data.draw(st.booleans()):
                self.table.answer(ticket.seat)
        return multiple(*(ticket.seat for ticket in tickets))

    @invariant()
    def nobody_is_lost(self):
        assert set(self.table.rendezvous.waiting) == self.waiting


RendezvousMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRendezvousMachine = RendezvousMachine.TestCase


def test_nobody_starves():
    """Whatever the others do, a call waits for no more batches than calls were before it, and groups are waited for."""
    table = Table(max_rows=2)
    patient, *others = seats(7)
    table.arrive(others[0], "b")
    table.arrive(patient, "a")
    for seat in others[1:]:
        table.arrive(seat, "b")
    batches = 0
    while 0 not in (picked := table.pick()):
        batches += 1
        table.now += STEP
        for number in picked:
            table.answer(others[number - 1])
            table.arrive(others[number - 1], "b")
        assert batches <= 1
