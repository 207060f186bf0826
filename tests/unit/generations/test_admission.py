"""The queue: order, positions, estimates and rejections."""

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


def measured(seconds_per_step: float = 1.0, overhead: float = 2.0) -> StepTimeEstimator:
    """Returns an estimator that has observed one generation."""
    estimator = StepTimeEstimator()
    estimator.observe_step(JOB, seconds_per_step, 1)
    estimator.observe_end(JOB, Timings(encoding_prompt=overhead / 2, decoding=overhead / 2))
    return estimator


class Mover:
    """Records the updates for one place in the queue."""

    def __init__(self) -> None:
        self.moves: list[tuple[int, float | None]] = []

    def __call__(self, position: int, remaining: float | None) -> None:
        self.moves.append((position, remaining))


async def test_the_first_request_starts_at_once_and_others_move_up() -> None:
    """Positions are reported on entry and on every change, and turns come in order."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=3, max_queue_per_caller=3)
    callers = [Mover() for _ in range(4)]
    tickets = [admission.enter(JOB, "a", caller) for caller in callers]
    assert [ticket.turn.done() for ticket in tickets] == [True, False, False, False]
    admission.leave(tickets[0])
    assert [ticket.turn.done() for ticket in tickets] == [True, True, False, False]
    await asyncio.sleep(0)
    admission.leave(tickets[2])
    await asyncio.sleep(0)
    assert [position for position, _ in callers[3].moves] == [3, 2, 1]
    admission.leave(tickets[1])
    assert tickets[3].turn.done()


async def test_estimates_are_refreshed_while_positions_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting request gets a new estimate as the work ahead progresses, which also keeps its stream alive."""
    monkeypatch.setattr("calotype_server.generations.admission._REFRESH_SECONDS", 0.001)
    updates: asyncio.Queue[tuple[int, float | None]] = asyncio.Queue()
    admission = Admission(measured(), max_active=1, max_queue=3, max_queue_per_caller=3)
    running = admission.enter(JOB, "a", Mover())
    admission.enter(JOB, "a", lambda *place: updates.put_nowait(place))
    first = await updates.get()
    running.left = 0.5
    while (now := await updates.get()) == first:
        pass
    assert (first, now) == ((1, 24.0), (1, 18.0))


async def test_leaving_twice_frees_only_one_slot() -> None:
    """A slot that is released twice is given to only one request."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=3, max_queue_per_caller=3)
    tickets = [admission.enter(JOB, "a", Mover()) for _ in range(3)]
    admission.leave(tickets[0])
    admission.leave(tickets[0])
    assert [ticket.turn.done() for ticket in tickets] == [True, True, False]


async def test_a_full_queue_rejects_with_a_retry_delay() -> None:
    """A request above the limit is rejected at once, with a delay from measured steps; others are not affected."""
    admission = Admission(measured(), max_active=1, max_queue=1)
    first, second = Mover(), Mover()
    admission.enter(JOB, "a", first)
    admission.enter(JOB, "a", second)
    with pytest.raises(errors.QueueFull) as caught:
        admission.enter(JOB, "a", Mover())
    assert caught.value.retry_after == pytest.approx(12.0, abs=1.0)
    assert len(first.moves) == len(second.moves) == 1


async def test_without_a_queue_requests_are_rejected_only_while_busy() -> None:
    """With `max_queue=0`, the server still runs one generation at a time."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=0)
    ticket = admission.enter(JOB, "a", Mover())
    with pytest.raises(errors.QueueFull):
        admission.enter(JOB, "a", Mover())
    admission.leave(ticket)
    assert admission.enter(JOB, "a", Mover()).turn.done()


async def test_a_deadline_below_the_estimate_is_rejected() -> None:
    """12 s of work exceed a deadline of 11 s, 24 s one of 20 s; without measurements, any deadline is accepted."""
    admission = Admission(measured(), max_active=1, max_queue=3, max_queue_per_caller=3)
    with pytest.raises(errors.DeadlineTooShort) as caught:
        admission.enter(JOB, "a", Mover(), deadline=11.0)
    assert float(caught.value.metadata["estimated_seconds"]) == pytest.approx(12.0)
    admission.enter(JOB, "a", Mover(), deadline=13.0)
    with pytest.raises(errors.DeadlineTooShort):
        admission.enter(JOB, "a", Mover(), deadline=20.0)
    admission.enter(JOB, "a", Mover(), deadline=25.0)
    Admission(StepTimeEstimator(), max_active=1, max_queue=0).enter(JOB, "a", Mover(), deadline=0.001)


async def test_rejections_by_deadline_end_on_an_idle_server() -> None:
    """An idle server reduces an estimate that was too high until a request is accepted and corrects it."""
    admission = Admission(measured(seconds_per_step=10.0), max_active=1, max_queue=3)
    rejected = 0
    while rejected < 100:
        try:
            admission.enter(JOB, "a", Mover(), deadline=20.0)
            break
        except errors.DeadlineTooShort:
            rejected += 1
    assert 5 < rejected < 30


async def test_estimates_add_up_along_the_queue() -> None:
    """The estimate for position 2 includes the running request, position 1 and itself; work is counted by pixels."""
    admission = Admission(measured(), max_active=1, max_queue=3, max_queue_per_caller=3)
    admission.enter(JOB, "a", Mover())
    admission.enter(replace(JOB, width=128), "a", Mover())
    third = Mover()
    admission.enter(JOB, "a", third)
    position, remaining = third.moves[-1]
    assert position == 2
    assert remaining == pytest.approx(12 + 24 + 12, abs=1.0)


async def test_callers_share_the_queue_evenly() -> None:
    """A caller with 3 queued requests delays the first of another caller by at most one."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=9)
    running = admission.enter(JOB, "a", Mover())
    first_caller = [admission.enter(JOB, "a", Mover()) for _ in range(3)]
    second_caller = [admission.enter(JOB, "b", Mover()) for _ in range(2)]
    order = []
    admission.leave(running)
    while waiting := [ticket for ticket in [*first_caller, *second_caller] if ticket not in order]:
        (current,) = [ticket for ticket in waiting if ticket.turn.done()]
        order.append(current)
        admission.leave(current)
    assert [ticket.caller for ticket in order] == ["b", "a", "b", "a", "a"]


async def test_one_caller_can_be_limited_to_a_share_of_the_queue() -> None:
    """The second waiting request of one caller is rejected; another caller's is accepted."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=3, max_queue_per_caller=1)
    for caller in ("a", "a"):
        admission.enter(JOB, caller, Mover())
    with pytest.raises(errors.QueueFull, match="You already have 1 waiting"):
        admission.enter(JOB, "a", Mover())
    assert not admission.enter(JOB, "b", Mover()).turn.done()


async def test_interactive_requests_overtake_batch_requests() -> None:
    """A batch request that arrived earlier runs after an interactive one, and receives its new position."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=3, max_queue_per_caller=3)
    running, batch = admission.enter(JOB, "a", Mover()), Mover()
    waiting = admission.enter(replace(JOB, priority=Priority.BATCH), "b", batch)
    interactive = admission.enter(JOB, "c", Mover())
    await asyncio.sleep(0)
    assert [position for position, _ in batch.moves] == [1, 2]
    admission.leave(running)
    assert interactive.turn.done()
    assert not waiting.turn.done()


async def test_the_last_free_slot_is_kept_for_interactive_requests() -> None:
    """Batch requests fill one of two slots and the queue; an interactive request still starts at once."""
    admission = Admission(StepTimeEstimator(), max_active=2, max_queue=2, max_queue_per_caller=2)
    batch = replace(JOB, priority=Priority.BATCH)
    turns = [admission.enter(batch, "a", Mover()).turn.done() for _ in range(3)]
    assert turns == [True, False, False]
    assert admission.enter(JOB, "b", Mover()).turn.done()


async def test_restored_work_is_never_rejected() -> None:
    """A full queue, the caller's share and a deadline reject new work, but not work that was accepted before."""
    admission = Admission(measured(), max_active=1, max_queue=1, max_queue_per_caller=1)
    admission.enter(JOB, "a", Mover())
    admission.enter(JOB, "a", Mover())
    for _ in range(4):
        admission.enter(JOB, "a", Mover(), deadline=0.001, restored=True)
    assert (admission.active, admission.waiting) == (1, 5)
    with pytest.raises(errors.QueueFull):
        admission.enter(JOB, "b", Mover())


async def test_restored_work_ramps_up() -> None:
    """After a restart, restored work uses one slot; each restored generation that ends doubles the number."""
    admission = Admission(StepTimeEstimator(), max_active=4, max_queue=3)
    waiting = [admission.enter(JOB, "a", Mover(), restored=True) for _ in range(12)]
    running = []
    counts = []
    for _ in range(4):
        running += [ticket for ticket in waiting if ticket.turn.done()]
        waiting = [ticket for ticket in waiting if not ticket.turn.done()]
        counts.append(len(running))
        admission.leave(running.pop(0))
    assert counts == [1, 2, 4, 4]


async def test_new_work_uses_the_slots_that_restored_work_may_not_use_yet() -> None:
    """Restored work that waits for the ramp delays neither new work nor loses its place to it."""
    admission = Admission(StepTimeEstimator(), max_active=2, max_queue=0)
    first, second = (admission.enter(JOB, "a", Mover(), restored=True) for _ in range(2))
    new = admission.enter(JOB, "b", Mover())
    assert [ticket.turn.done() for ticket in (first, second, new)] == [True, False, True]
    admission.leave(first)
    assert second.turn.done()


async def test_suspect_work_runs_one_at_a_time() -> None:
    """Of the generations that ran when the process crashed, a second starts only after the first has ended."""
    admission = Admission(StepTimeEstimator(), max_active=4, max_queue=4)
    suspects = [admission.enter(JOB, "a", Mover(), restored=True, suspect=True) for _ in range(3)]
    harmless = [admission.enter(JOB, "a", Mover(), restored=True) for _ in range(2)]
    assert [ticket.turn.done() for ticket in (*suspects, *harmless)] == [True, False, False, False, False]
    admission.leave(suspects[0])
    assert [ticket.turn.done() for ticket in (*suspects[1:], *harmless)] == [True, False, True, False]
    admission.leave(suspects[1])
    assert [ticket.turn.done() for ticket in (suspects[2], harmless[1])] == [True, True]


@given(
    st.lists(st.tuples(st.sampled_from(["new", "restored", "suspect", "leave"]), st.integers(0, 20)), max_size=40),
    st.integers(1, 4),
)
async def test_restored_and_new_work_do_not_starve_each_other(actions: list, max_active: int) -> None:
    """Whatever arrives and ends, the running work keeps the limits, and in the end everything has run."""
    admission = Admission(StepTimeEstimator(), max_active=max_active, max_queue=100)
    inside = []
    for action, which in actions:
        if action != "leave":
            caller = "ab"[which % 2]
            old = action != "new"
            inside.append(admission.enter(JOB, caller, Mover(), restored=old, suspect=action == "suspect"))
        elif inside:
            admission.leave(inside.pop(which % len(inside)))
        running = [ticket for ticket in inside if ticket.turn.done()]
        assert len(running) <= max_active
        assert sum(ticket.suspect for ticket in running) <= 1
        assert any(ticket.turn.done() for ticket in inside) or not inside
    while inside:
        (*_, ended) = (ticket for ticket in inside if ticket.turn.done())
        inside.remove(ended)
        admission.leave(ended)


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave"]), st.integers(0, 20))), st.integers(1, 3))
async def test_slots_are_neither_lost_nor_used_twice(actions: list, max_active: int) -> None:
    """At most `max_active` requests have a turn, in order, and no slot stays free while requests wait."""
    admission = Admission(StepTimeEstimator(), max_active=max_active, max_queue=5, max_queue_per_caller=5)
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


class TestGenerationsThatWaitForOlderOnes:
    """Of three running generations, only the first progresses: 10 s for its steps, and 2 s around them."""

    @staticmethod
    def admission(max_progressing: int = 1) -> Admission:
        return Admission(measured(), max_active=3, max_progressing=max_progressing, max_queue=3, max_queue_per_caller=3)

    async def test_a_running_generation_counts_the_older_ones(self) -> None:
        """The second waits for the rest of the first, and the third for both."""
        admission = self.admission()
        tickets = [admission.enter(JOB, "a", Mover()) for _ in range(3)]
        tickets[0].note_left(0.5)
        assert [admission.seconds_left(ticket, 1.0) for ticket in tickets] == pytest.approx([1.0, 18.0, 30.0])
        assert (admission.active, admission.progressing) == (3, 1)

    async def test_a_new_generation_counts_all_running_ones(self) -> None:
        """Neither the position nor the deadline of a job is based on an even share of the device."""
        admission, mover = self.admission(), Mover()
        for _ in range(3):
            admission.enter(JOB, "a", Mover())
        admission.enter(JOB, "a", mover)
        [(position, remaining)] = mover.moves
        assert position == 1
        assert remaining == pytest.approx(48.0)
        with pytest.raises(errors.DeadlineTooShort, match=r"about 60\.0 s"):
            admission.enter(JOB, "a", Mover(), deadline=59.0)

    async def test_a_place_is_free_when_the_oldest_generation_ends(self) -> None:
        """The next slot is free after 12 s, although the job that gets it ends much later."""
        admission = self.admission()
        for _ in range(6):
            admission.enter(JOB, "a", Mover())
        with pytest.raises(errors.QueueFull) as raised:
            admission.enter(JOB, "a", Mover())
        assert raised.value.retry_after == pytest.approx(12.0)

    @pytest.mark.parametrize(("max_progressing", "wait"), [(1, 36.0), (3, 0.0), (0, 0.0)])
    async def test_the_usual_wait(self, max_progressing: int, wait: float) -> None:
        """A generation waits at most as long as all running ones take; not at all if all progress."""
        admission = self.admission(max_progressing)
        for _ in range(3):
            admission.enter(JOB, "a", Mover())
        assert admission.usual_wait == pytest.approx(wait)

    async def test_the_usual_wait_is_unknown_before_the_first_measurement(self) -> None:
        """The watchdog then relies on the progress of the others."""
        admission = Admission(StepTimeEstimator(), max_active=2, max_progressing=1, max_queue=3)
        for _ in range(2):
            admission.enter(JOB, "a", Mover())
        assert admission.usual_wait == float("inf")
