"""Fair shares: no caller can take every slot, every place in the queue or all memory while another waits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server import errors
from calotype_server.generations.admission import Admission
from calotype_server.generations.estimates import StepTimeEstimator
from calotype_server.types import Job, MemoryModel, Priority, Timings

if TYPE_CHECKING:
    from calotype_server.generations.admission import QueueTicket

JOB = Job("a cat", None, 64, 64, 10, 3.0, 0, "DDIMScheduler")
LARGE = replace(JOB, width=256, height=256)


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def enter(admission: Admission, caller: str, job: Job = JOB, **options: bool) -> QueueTicket:
    """Enters without interest in positions."""
    return admission.enter(job, caller, lambda *_: None, **options)


def fill(admission: Admission, caller: str, job: Job = JOB) -> list[QueueTicket]:
    """Enters until the caller is rejected."""
    tickets = []
    while len(tickets) < 1000:
        try:
            tickets.append(enter(admission, caller, job))
        except errors.QueueFull:
            break
    return tickets


def started(tickets: list[QueueTicket]) -> int:
    """Returns the number of tickets that have a slot."""
    return sum(ticket.turn.done() for ticket in tickets)


async def test_one_caller_gets_half_of_the_queue() -> None:
    """A caller that sends as much as it can fills half of the queue; another caller still gets a place."""
    admission = Admission(StepTimeEstimator(), max_active=2, max_queue=8)
    assert len(fill(admission, "hog")) == 2 + 4
    assert not enter(admission, "other").turn.done()


async def test_two_callers_cannot_fill_the_queue() -> None:
    """The second half of the queue has only one place for each caller, so a third caller still gets one."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=8)
    counts = [len(fill(admission, caller)) for caller in "abcde"]
    assert counts == [1 + 4, 1, 1, 1, 1]
    with pytest.raises(errors.QueueFull, match="The queue is full"):
        enter(admission, "f")


async def test_restored_work_leaves_the_queue_to_new_work() -> None:
    """Restored work takes none of the places for new work, but it counts for the share of its caller."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=8)
    for _ in range(20):
        enter(admission, "a", restored=True)
    assert len(fill(admission, "a")) == 0
    assert len(fill(admission, "b")) == 4


async def test_an_operator_can_give_one_caller_the_whole_queue() -> None:
    """With a caller's limit as large as the queue, no place is kept for others."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=8, max_queue_per_caller=8)
    assert len(fill(admission, "hog")) == 1 + 8


async def test_a_slot_is_kept_for_other_callers() -> None:
    """On a shared server, a caller does not get the last slot, whatever it sends; another caller starts at once."""
    admission = Admission(StepTimeEstimator(), max_active=4, max_queue=32, shared=True)
    assert started(fill(admission, "hog")) == 3
    assert enter(admission, "other").turn.done()


async def test_a_lone_caller_uses_every_slot() -> None:
    """Without another caller in the last ten minutes, no slot stays idle; with one, the last slot is kept for it."""
    clock = Clock()
    admission = Admission(StepTimeEstimator(), max_active=3, max_queue=32, clock=clock)
    tickets = fill(admission, "a")
    assert started(tickets) == 3
    guest = enter(admission, "guest")
    assert not guest.turn.done()
    admission.leave(tickets[0])
    admission.leave(guest)
    admission.leave(tickets[1])
    assert started(tickets) == 2 + 2
    clock.now = 601.0
    admission.leave(tickets[2])
    assert started(tickets) == 3 + 3


async def test_a_kept_slot_is_used_when_nobody_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the other caller stays away, the slot is used without any other event in the queue."""
    monkeypatch.setattr("calotype_server.generations.admission._REFRESH_SECONDS", 0.001)
    clock = Clock()
    admission = Admission(StepTimeEstimator(), max_active=2, max_queue=32, clock=clock)
    admission.leave(enter(admission, "guest"))
    first, second = enter(admission, "a"), enter(admission, "a")
    assert (first.turn.done(), second.turn.done()) == (True, False)
    clock.now = 601.0
    await second.turn


async def test_the_warm_up_is_not_another_caller() -> None:
    """After the server's own first images, the first caller uses every slot."""
    admission = Admission(StepTimeEstimator(), max_active=2, max_queue=32)
    admission.leave(enter(admission, ""))
    assert started(fill(admission, "a")) == 2


async def test_two_busy_callers_leave_no_slot_idle() -> None:
    """The last slot is kept only from a caller that holds all others."""
    admission = Admission(StepTimeEstimator(), max_active=4, max_queue=32, shared=True)
    tickets = [enter(admission, caller) for caller in "abababab"]
    assert started(tickets) == 4


MEMORY = MemoryModel(available=100 * JOB.pixel_count, denoising=(1.0, 0.0), decoding=(0.0, 0.0))


def with_memory(*, shared: bool = False) -> Admission:
    """Returns a queue in front of 8 slots, in whose memory 100 small or 6 large images fit."""
    return Admission(
        StepTimeEstimator(), max_active=8, max_queue=32, shared=shared, memory=MEMORY, spare=JOB.pixel_count
    )


async def test_images_that_do_not_fit_into_memory_wait() -> None:
    """Only as many run at once as fit. A small image does not overtake a large one that waits for memory."""
    admission = with_memory()
    tickets = [enter(admission, "a", LARGE) for _ in range(7)]
    small = enter(admission, "a")
    assert started(tickets) == 6
    assert not small.turn.done()
    admission.leave(tickets[0])
    assert (started(tickets), small.turn.done()) == (7, True)


async def test_an_image_that_needs_all_memory_runs_alone() -> None:
    """An image that was accepted, or restored, starts when nothing else runs, even if it needs too much memory."""
    admission = with_memory()
    small = enter(admission, "a")
    huge = enter(admission, "b", replace(JOB, width=2048, height=2048), restored=True)
    assert not huge.turn.done()
    admission.leave(small)
    assert huge.turn.done()
    assert not enter(admission, "a").turn.done()


async def test_memory_is_kept_for_other_callers() -> None:
    """On a shared server, one caller leaves memory for an image of the default size of another caller."""
    admission = with_memory(shared=True)
    wide = replace(JOB, width=64 * 25)
    assert started([enter(admission, "hog", wide) for _ in range(4)]) == 3
    assert enter(admission, "other").turn.done()


@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["hog", "batch", "restored", "leave"]), st.integers(1, 40), st.integers(0, 50)),
        max_size=60,
    ),
    max_active=st.integers(1, 4),
    hogs=st.integers(1, 2),
)
async def test_another_caller_starts_within_a_bound(actions: list, max_active: int, hogs: int) -> None:
    """Whatever hogs send, a caller without work gets a place, and starts after few other generations.

    One hog: at once if there are several slots, and after one end otherwise. Two hogs: after at most three ends.
    """
    admission = Admission(StepTimeEstimator(), max_active=max_active, max_queue=8, shared=True)
    inside: list[QueueTicket] = []
    for action, size, which in actions:
        if action == "leave":
            if running := [ticket for ticket in inside if ticket.turn.done()]:
                ended = running[which % len(running)]
                inside.remove(ended)
                admission.leave(ended)
            continue
        job = replace(JOB, width=64 * size, priority=Priority.BATCH if action == "batch" else Priority.INTERACTIVE)
        try:
            inside.append(enter(admission, f"hog {which % hogs}", job, restored=action == "restored"))
        except errors.QueueFull:
            continue
    other = enter(admission, "other")
    ends = 0
    while not other.turn.done():
        ended = next(ticket for ticket in inside if ticket.turn.done())
        inside.remove(ended)
        admission.leave(ended)
        ends += 1
    assert ends <= (3 if hogs == 2 else max_active == 1)


async def test_work_that_was_held_back_does_not_start_all_at_once() -> None:
    """Batch work that waited while others ran delays the first batch job of another caller by one, not by all."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=32)
    running = enter(admission, "c", LARGE)
    batch = replace(JOB, priority=Priority.BATCH)
    hog = [enter(admission, "hog", batch) for _ in range(8)]
    for _ in range(3):
        following = enter(admission, "c", LARGE)
        admission.leave(running)
        running = following
    other = enter(admission, "other", batch)
    admission.leave(running)
    admission.leave(hog[0])
    assert (started(hog), other.turn.done()) == (1, True)


async def test_several_jobs_get_places_together_or_none() -> None:
    """If one of them finds no place, none enters, and nothing changes for other callers."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=4)
    moves: list[int] = []
    running = enter(admission, "other")
    jobs = [(JOB, lambda position, _: moves.append(position))] * 3
    with pytest.raises(errors.QueueFull) as caught:
        admission.enter_all(jobs, "a")
    assert caught.value.retry_after
    assert (admission.active, admission.waiting, moves) == (1, 0, [])
    assert [ticket.turn.done() for ticket in admission.enter_all(jobs[:2], "a")] == [False, False]
    admission.leave(running)
    assert moves == [1, 2]


@pytest.mark.parametrize(("count", "most"), [(4, 3), (50, 3)])
async def test_jobs_that_never_fit_are_an_invalid_request(count: int, most: int) -> None:
    """More jobs than slots and places are rejected without a retry delay, even while the server is idle."""
    admission = Admission(StepTimeEstimator(), max_active=1, max_queue=4)
    jobs = [(JOB, lambda *_: None)] * count
    with pytest.raises(errors.InvalidRequest, match=f"at most {most} such images at once") as caught:
        admission.require_possible([job for job, _ in jobs], "a")
    assert caught.value.retry_after is None
    admission.require_possible([job for job, _ in jobs[:most]], "a")
    assert len(admission.enter_all(jobs[:most], "a")) == most


async def test_the_deadline_counts_for_the_last_of_several_jobs() -> None:
    """A deadline that only the first job meets rejects all of them."""
    estimator = StepTimeEstimator()
    estimator.observe_step(JOB, 1.0, 1)
    estimator.observe_end(JOB, Timings(encoding_prompt=1.0, decoding=1.0))
    admission = Admission(estimator, max_active=1, max_queue=4)
    jobs = [(JOB, lambda *_: None)] * 2
    with pytest.raises(errors.DeadlineTooShort):
        admission.enter_all(jobs, "a", deadline=20.0)
    assert (admission.active, admission.waiting) == (0, 0)
    admission.enter_all(jobs, "a", deadline=25.0)


async def test_the_retry_delay_of_a_caller_counts_its_own_next_start() -> None:
    """If only the caller's share is full, the delay is the time until the caller's next job starts."""
    estimator = StepTimeEstimator()
    estimator.observe_step(JOB, 1.0, 1)
    estimator.observe_end(JOB, Timings(encoding_prompt=1.0, decoding=1.0))
    admission = Admission(estimator, max_active=1, max_queue=4, max_queue_per_caller=1)
    enter(admission, "a")
    enter(admission, "b")
    enter(admission, "a")
    with pytest.raises(errors.QueueFull) as caught:
        enter(admission, "a")
    assert caught.value.retry_after == pytest.approx(24.0)
