"""The scheduler with requests that arrive, look, end, pause and are withdrawn in any order."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from calotype_server.engine.batching.pending import RequestSlot
from calotype_server.engine.batching.urgency import LOOKS_IN_A_ROW
from calotype_server.types import Schedule
from support.engine.scheduling import STEP, WAIT, Simulation


class SchedulerMachine(RuleBasedStateMachine):
    """Requests that arrive, look, end, pause and are withdrawn in any order, with each schedule."""

    outside, answered = Bundle("outside"), Bundle("answered")

    def __init__(self):
        super().__init__()
        self.simulation = Simulation(max_rows=5)
        self.schedule = Schedule.FIRST_LOOK
        self.number = 0
        self.waiting = set()
        self.overtaken = 0

    @initialize(schedule=st.sampled_from(Schedule))
    def choose(self, schedule):
        self.schedule = schedule
        self.simulation = Simulation(max_rows=5, schedule=schedule)

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

    @rule(slot=consumes(answered), target=answered)
    def look(self, slot):
        self.simulation.scheduler.note_look(slot)
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
        if self.schedule is Schedule.FAIR:
            self.check_oldest_calls(calls, group, waiting)
        else:
            self.check_most_urgent(calls, group, waiting)
        self.waiting.difference_update(calls)
        self.simulation.running |= {pending.slot: pending for pending in calls}
        for pending in calls:
            if data.draw(st.booleans()):
                self.simulation.answer(pending.slot)
        return multiple(*(pending.slot for pending in calls))

    def check_oldest_calls(self, calls, group, waiting):
        assert calls == group[: len(calls)], "not the oldest of their group"
        for pending in waiting[: waiting.index(calls[0])]:
            limit = pending.device_free_since + self.simulation.scheduler.max_wait
            assert self.simulation.now < limit, "overtaken by a younger call"

    def check_most_urgent(self, calls, group, waiting):
        oldest = min(waiting, key=lambda pending: pending.slot.number)
        new = [pending for pending in waiting if not pending.slot.looked]
        if self.schedule is Schedule.FIFO or not new:
            assert calls[0] is oldest, "not the oldest request"
        else:
            assert calls[0] in (oldest, min(new, key=lambda pending: pending.slot.number)), "neither new nor the oldest"
        waits = any(pending.slot.looked for pending in waiting if pending not in calls)
        self.overtaken = self.overtaken + 1 if waits and not calls[0].slot.looked and calls[0] is not oldest else 0
        assert self.overtaken <= LOOKS_IN_A_ROW, "new requests overtake without limit"
        room = 5 - sum(pending.call.rows for pending in calls)
        assert all(pending.call.rows > room for pending in group if pending not in calls), "the batch has room"

    @invariant()
    def no_call_is_lost(self):
        assert set(self.simulation.scheduler.waiting) == self.waiting


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
