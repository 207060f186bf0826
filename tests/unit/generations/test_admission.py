"""The queue: order, positions, estimates, refusals."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server import errors
from calotype_server.generations.admission import Admission
from calotype_server.generations.estimates import StepTimeEstimator
from calotype_server.types import Job, Priority, Timings

JOB = Job("a cat", None, 64, 64, 10, 3.0, 0, "DDIMScheduler")


def paced(seconds_per_step: float = 1.0, around: float = 2.0) -> StepTimeEstimator:
    """A pace that has seen one generation."""
    pace = StepTimeEstimator()
    pace.observe_step(JOB, seconds_per_step, 1)
    pace.observe_end(JOB, Timings(encoding_prompt=around / 2, decoding=around / 2))
    return pace


class Mover:
    """Records what the queue tells about one place."""

    def __init__(self) -> None:
        self.moves: list[tuple[int, float | None]] = []

    def __call__(self, position: int, remaining: float | None) -> None:
        self.moves.append((position, remaining))


async def test_the_first_starts_at_once_and_others_move_up() -> None:
    """Positions are told on entry and on every change, and turns come in order."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=3)
    callers = [Mover() for _ in range(4)]
    tickets = [admission.enter(JOB, "a", caller) for caller in callers]
    assert [ticket.turn.done() for ticket in tickets] == [True, False, False, False]
    admission.leave(tickets[0])
    assert [ticket.turn.done() for ticket in tickets] == [True, True, False, False]
    admission.leave(tickets[2])
    assert [position for position, _ in callers[3].moves] == [3, 2, 1]
    admission.leave(tickets[1])
    assert tickets[3].turn.done()


async def test_who_waits_is_told_how_long_although_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work ahead goes on, and a stream that is silent for too long is cut on its way."""
    monkeypatch.setattr("calotype_server.generations.admission._REFRESH_SECONDS", 0.001)
    told: asyncio.Queue[tuple[int, float | None]] = asyncio.Queue()
    admission = Admission(paced(), max_active=1, max_queue=3)
    running = admission.enter(JOB, "a", Mover())
    admission.enter(JOB, "a", lambda *place: told.put_nowait(place))
    first = await told.get()
    running.left = 0.5
    while (now := await told.get()) == first:
        pass
    assert (first, now) == ((1, 24.0), (1, 18.0))


async def test_leaving_twice_frees_one_slot_only() -> None:
    """A slot given back twice must not let two in."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=3)
    tickets = [admission.enter(JOB, "a", Mover()) for _ in range(3)]
    admission.leave(tickets[0])
    admission.leave(tickets[0])
    assert [ticket.turn.done() for ticket in tickets] == [True, True, False]


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    """One more than fits is refused at once, with a time from measured steps; nobody else is disturbed."""
    admission = Admission(paced(), max_active=1, max_queue=1)
    first, second = Mover(), Mover()
    admission.enter(JOB, "a", first)
    admission.enter(JOB, "a", second)
    with pytest.raises(errors.QueueFull) as caught:
        admission.enter(JOB, "a", Mover())
    assert caught.value.retry_after == pytest.approx(12.0, abs=1.0)
    assert len(first.moves) == len(second.moves) == 1


async def test_no_queue_means_refusal_only_while_busy() -> None:
    """`max_queue` of 0 still serves one at a time."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=0)
    ticket = admission.enter(JOB, "a", Mover())
    with pytest.raises(errors.QueueFull):
        admission.enter(JOB, "a", Mover())
    admission.leave(ticket)
    assert admission.enter(JOB, "a", Mover()).turn.done()


async def test_a_hopeless_deadline_is_refused_before_any_work() -> None:
    """12 s of work do not fit into 11, nor 24 behind another; 13 do, and without measurements nobody is refused."""
    admission = Admission(paced(), max_active=1, max_queue=3)
    with pytest.raises(errors.DeadlineTooShort) as caught:
        admission.enter(JOB, "a", Mover(), deadline=11.0)
    assert float(caught.value.metadata["estimated_seconds"]) == pytest.approx(12.0)
    admission.enter(JOB, "a", Mover(), deadline=13.0)
    with pytest.raises(errors.DeadlineTooShort):
        admission.enter(JOB, "a", Mover(), deadline=20.0)
    admission.enter(JOB, "a", Mover(), deadline=25.0)
    Admission(StepTimeEstimator(), max_active=1, max_queue=0).enter(JOB, "a", Mover(), deadline=0.001)


async def test_refusals_by_deadline_cannot_go_on_for_ever() -> None:
    """On an idle server, an estimate that was once too high is doubted until somebody gets through to correct it."""
    admission = Admission(paced(seconds_per_step=10.0), max_active=1, max_queue=3)
    refused = 0
    while refused < 100:
        try:
            admission.enter(JOB, "a", Mover(), deadline=20.0)
            break
        except errors.DeadlineTooShort:
            refused += 1
    assert 5 < refused < 30


async def test_estimates_add_up_along_the_queue() -> None:
    """Position 2 waits for what is running, position 1 and itself; larger pictures count by their pixels."""
    admission = Admission(paced(), max_active=1, max_queue=3)
    admission.enter(JOB, "a", Mover())
    admission.enter(replace(JOB, width=128), "a", Mover())
    third = Mover()
    admission.enter(JOB, "a", third)
    position, remaining = third.moves[-1]
    assert position == 2
    assert remaining == pytest.approx(12 + 24 + 12, abs=1.0)


async def test_callers_share_the_queue_evenly() -> None:
    """One who queued three pictures delays another's first by one at most; alone, callers go in order of arrival."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=9)
    running = admission.enter(JOB, "a", Mover())
    hers = [admission.enter(JOB, "a", Mover()) for _ in range(3)]
    his = [admission.enter(JOB, "b", Mover()) for _ in range(2)]
    order = []
    admission.leave(running)
    while waiting := [ticket for ticket in [*hers, *his] if ticket not in order]:
        (current,) = [ticket for ticket in waiting if ticket.turn.done()]
        order.append(current)
        admission.leave(current)
    assert [ticket.caller for ticket in order] == ["b", "a", "b", "a", "a"]


async def test_a_caller_may_be_held_to_a_share_of_the_queue() -> None:
    """The second waiting picture of one caller is refused; another caller still finds room."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=3, max_queue_per_caller=1)
    for caller in ("a", "a"):
        admission.enter(JOB, caller, Mover())
    with pytest.raises(errors.QueueFull, match="You already have 1 waiting"):
        admission.enter(JOB, "a", Mover())
    assert not admission.enter(JOB, "b", Mover()).turn.done()


async def test_interactive_goes_before_batch() -> None:
    """A batch that waits longer lets whoever waits in person go first, and is told its new position."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=3)
    running, batch = admission.enter(JOB, "a", Mover()), Mover()
    waiting = admission.enter(replace(JOB, priority=Priority.BATCH), "b", batch)
    person = admission.enter(JOB, "c", Mover())
    assert [position for position, _ in batch.moves] == [1, 2]
    admission.leave(running)
    assert person.turn.done()
    assert not waiting.turn.done()


async def test_the_last_of_several_slots_is_kept_for_people() -> None:
    """Batches fill one of two slots and the queue; whoever waits in person still starts at once."""
    admission = Admission(StepTimeEstimator(), max_active=2, max_queue=2)
    batch = replace(JOB, priority=Priority.BATCH)
    turns = [admission.enter(batch, "a", Mover()).turn.done() for _ in range(3)]
    assert turns == [True, False, False]
    assert admission.enter(JOB, "b", Mover()).turn.done()


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave"]), st.integers(0, 20))), st.integers(1, 3))
async def test_slots_are_never_lost_nor_shared(actions: list, max_active: int) -> None:
    """Whatever comes and goes: at most `max_active` have a turn, nobody waits beside a free slot, order is kept."""
    admission = Admission(StepTimeEstimator(), max_active=max_active, max_queue=5)
    inside = []
    for action, which in actions:
        if action == "enter":
            try:
                inside.append(admission.enter(JOB, "a", Mover()))
            except errors.QueueFull:
                assert len(inside) == max_active + 5
        elif inside:
            admission.leave(inside.pop(which % len(inside)))
        turns = [ticket.turn.done() for ticket in inside]
        assert turns == sorted(turns, reverse=True)
        assert sum(turns) == min(max_active, len(inside))
