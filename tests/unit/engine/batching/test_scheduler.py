"""The scheduler's decisions, on a simulated clock."""

import pytest

from calotype_server.engine.batching.pending import RequestSlot
from calotype_server.engine.batching.scheduler import BatchScheduler
from calotype_server.types import Schedule
from support.engine.scheduling import STEP, WAIT, Simulation


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
    assert simulation.pick() == [0, 1, 2]


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
    assert simulation.pick() == [0, 1]


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


def test_a_full_batch_does_not_wait():
    """In turn, a batch that has no room for the expected call runs at once."""
    simulation = Simulation(max_rows=5, schedule=Schedule.FAIR)
    a, b, c = slots(3)
    for slot in (a, b):
        simulation.arrive(slot, rows=2)
    assert simulation.pick() == [0, 1]
    simulation.answer(a, b)
    simulation.arrive(a, rows=2)
    assert simulation.pick() == []
    simulation.arrive(c, rows=2)
    assert simulation.pick() == [0, 2]


@pytest.mark.parametrize("schedule", [Schedule.FIRST_LOOK, Schedule.FIFO])
def test_a_full_batch_waits_only_for_more_urgent_requests(schedule):
    """If two fit, the batch of the first and the third waits for the second, but only for `max_wait`."""
    simulation = Simulation(max_rows=2, schedule=schedule)
    a, b, c = slots(3)
    simulation.step(a, b)
    simulation.arrive(c)
    simulation.arrive(a)
    assert simulation.pick() == []
    simulation.arrive(b)
    assert simulation.pick() == [0, 1]
    simulation.now += STEP
    simulation.answer(a, b)
    simulation.arrive(a)
    assert simulation.pick() == []
    simulation.now += WAIT
    assert simulation.pick() == [0, 2]


def test_first_steps_come_first():
    """A request that has not finished its first step runs before an older one, and after it behind it."""
    simulation = Simulation(max_rows=1)
    a, b = slots(2)
    simulation.step(a)
    simulation.scheduler.note_look(a)
    simulation.arrive(a)
    simulation.arrive(b)
    assert simulation.pick() == [1]
    simulation.answer(b)
    simulation.scheduler.note_look(b)
    simulation.arrive(b)
    assert simulation.pick() == [0]


def test_a_first_step_of_several_calls_is_finished_first():
    """A request whose first step takes two calls runs both before older requests."""
    simulation = Simulation(max_rows=1)
    a, b = slots(2)
    simulation.scheduler.note_look(a)
    simulation.arrive(a)
    simulation.arrive(b)
    assert simulation.pick() == [1]
    simulation.answer(b)
    assert simulation.pick() == []
    simulation.arrive(b)
    assert simulation.pick() == [1]


def test_requests_that_ran_queue_behind_waiting_ones():
    """With six requests and room for four, in turn, each request runs in two of any three batches."""
    simulation = Simulation(max_rows=4, schedule=Schedule.FAIR)
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


@pytest.mark.parametrize("schedule", Schedule)
def test_the_group_with_the_oldest_call_runs_first(schedule):
    """Groups of different sizes run in the order of their oldest calls."""
    simulation = Simulation(schedule=schedule)
    a, b, c = slots(3)
    simulation.arrive(a, "small")
    simulation.arrive(b, "large")
    simulation.arrive(c, "small")
    assert simulation.pick() == [0, 2]
    assert simulation.pick() == [1]


def test_a_waiting_group_does_not_keep_the_device_idle():
    """In turn, while the older group waits for a request, a complete younger group runs."""
    simulation = Simulation(schedule=Schedule.FAIR)
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


def test_no_call_starves():
    """In turn, a call of another group runs after at most one batch, although the other group always has calls."""
    simulation = Simulation(max_rows=2, schedule=Schedule.FAIR)
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
