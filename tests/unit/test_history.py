"""The checker of histories finds each kind of broken promise."""

from __future__ import annotations

import json

import pytest

from calotype_server.generations.store import Store
from calotype_server.types import DeliveryOptions, Job, Succeeded
from support.engine.fake_engine import FakeEngine
from support.history import CHECKS, CRASHED, History, violations
from support.history.facts import Listed, Logged, Stored
from support.runtime import running_runtime

A, B = "aa.1", "aa.2"


def good() -> History:
    """A history without faults: two readers of one generation, a restart, a cancelled one, and a rejected call."""
    history = History()
    first = history.reader(caller="me", request_id="r", recipe="fox")
    second = history.reader(recipe="fox")
    for reader in (first, second):
        reader.saw(A, 1, "QUEUED", 0)
        reader.saw(A, 3, "DENOISING", 2)
    log(history, A, "SUCCEEDED")
    first.saw(A, 4, "SUCCEEDED", 4)
    first.ended(image=b"a fox")
    history.crashed()
    second.saw(A, 5, "SUCCEEDED", 4)
    second.ended(image=b"a fox")
    third = history.reader()
    third.saw(B, 1, "QUEUED", 0)
    log(history, B, "CANCELLED")
    third.ended("CANCELLED")
    history.reader().refused("QUEUE_FULL")
    history.reader().left()
    history.add(Listed(generation=A, phase="succeeded"))
    history.add(Listed(generation=B, phase="cancelled"))
    history.settled(active=0, waiting=0)
    history.stopped(0)
    return history


def log(history: History, generation: str, outcome: str) -> None:
    """Adds the line that reports the end of a generation."""
    history.add(Logged(generation=generation, event="generation ended", outcome=outcome))


def never_ended(history: History) -> None:
    """A caller sees a generation that never ends."""
    reader = history.reader()
    reader.saw("aa.3", 1, "QUEUED", 0)
    reader.refused()


def stored_but_never_ended(history: History) -> None:
    """The store has an accepted generation that never ends."""
    history.add(Stored(generation="aa.3"))


def two_ends(history: History) -> None:
    """A reader receives the end twice."""
    reader = history.reader()
    reader.saw(A, 1, "QUEUED", 0)
    reader.ended(image=b"a fox")
    reader.ended(image=b"a fox")


def message_after_the_end(history: History) -> None:
    """A reader receives a message after the end."""
    reader = history.reader()
    reader.saw(A, 1, "QUEUED", 0)
    reader.ended(image=b"a fox")
    reader.saw(A, 2, "DENOISING", 1)


def another_end_in_the_store(history: History) -> None:
    """The store has another end than the caller saw."""
    history.add(Stored(generation=B, outcome="SUCCEEDED"))


def another_image_for_another_reader(history: History) -> None:
    """A second reader gets another image of the same generation."""
    reader = history.reader()
    reader.saw(A, 9, "SUCCEEDED", 4)
    reader.ended(image=b"a dog")


def runs_again_after_its_end(history: History) -> None:
    """A generation that ended is listed as running."""
    history.add(Listed(generation=A, phase="denoising"))


def one_request_id_two_generations(history: History) -> None:
    """A repeated request starts a second generation."""
    reader = history.reader(caller="me", request_id="r")
    reader.saw("aa.3", 1, "QUEUED", 0)
    log(history, "aa.3", "SUCCEEDED")
    reader.ended()


def one_recipe_two_images(history: History) -> None:
    """The same request gives two images."""
    reader = history.reader(recipe="fox")
    reader.saw("aa.3", 1, "QUEUED", 0)
    log(history, "aa.3", "SUCCEEDED")
    reader.ended(image=b"a dog")


def sequence_falls(history: History) -> None:
    """A sequence number repeats."""
    reader = history.reader()
    reader.saw(A, 2, "DENOISING", 1)
    reader.saw(A, 2, "DENOISING", 2)
    reader.left()


def step_falls(history: History) -> None:
    """A step number falls."""
    reader = history.reader()
    reader.saw(A, 2, "DENOISING", 2)
    reader.saw(A, 3, "DENOISING", 1)
    reader.left()


def reader_waits(history: History) -> None:
    """A reader waits forever."""
    history.reader().saw(A, 1, "QUEUED", 0)


def ignores_sigterm(history: History) -> None:
    """The server does not stop."""
    history.stopped(None)


def slot_is_lost(history: History) -> None:
    """A slot stays occupied."""
    history.settled(active=1, waiting=0)


def failure_without_reason(history: History) -> None:
    """An error has no reason."""
    reader = history.reader()
    reader.saw("aa.3", 1, "QUEUED", 0)
    reader.ended("")


def failure_without_log(history: History) -> None:
    """The log does not mention a failure."""
    before = len(history.facts)
    reader = history.reader()
    reader.saw("aa.3", 1, "QUEUED", 0)
    reader.ended("GENERATION_FAILED")
    # Earlier than the crash, which would excuse it.
    history.facts[:0] = history.facts[before:]
    del history.facts[-3:]


def stored_attempts(history: History) -> None:
    """The store counts too many attempts."""
    history.add(Stored(generation=A, outcome="SUCCEEDED", attempts=3))


def crash_loop(history: History) -> None:
    """A generation runs at every crash and still gets another attempt."""
    reader = history.reader()
    for attempt in range(1, 4):
        reader.saw("aa.3", 10 * attempt, "DENOISING", 1)
        history.crashed()
    log(history, "aa.3", "SUCCEEDED")
    reader.ended()


BAD = {
    never_ended: "ends once",
    stored_but_never_ended: "ends once",
    two_ends: "ends once",
    message_after_the_end: "ends once",
    another_end_in_the_store: "ends are final",
    another_image_for_another_reader: "ends are final",
    runs_again_after_its_end: "listings agree",
    one_request_id_two_generations: "request ids start once",
    one_recipe_two_images: "images repeat",
    sequence_falls: "readers move forward",
    step_falls: "readers move forward",
    reader_waits: "nothing hangs",
    ignores_sigterm: "nothing hangs",
    slot_is_lost: "slots return",
    failure_without_reason: "failures are explained",
    failure_without_log: "failures are explained",
    stored_attempts: "attempts are bounded",
    crash_loop: "attempts are bounded",
}


def test_a_good_history_has_no_violations() -> None:
    """Reconnects, restarts, cancels and rejected calls break no promise."""
    assert violations(good()) == []


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_history_is_found(spoil) -> None:
    """Each fault breaks exactly the invariant that it is about."""
    history = good()
    spoil(history)
    assert {each.invariant for each in violations(history)} == {BAD[spoil]}


def test_every_invariant_can_fail() -> None:
    """There is a bad history for each invariant."""
    assert set(BAD.values()) == set(CHECKS)


def test_generations_of_a_server_without_state_may_disappear() -> None:
    """When such a server is killed, its generations need no end, and a request id may start another one."""
    history = good()
    never_ended(history)
    history.crashed(forgets="aa")
    reader = history.reader(caller="me", request_id="r", recipe="fox")
    reader.saw("bb.1", 9, "QUEUED", 0)
    log(history, "bb.1", "SUCCEEDED")
    reader.ended(image=b"a fox")
    assert violations(history) == []


@pytest.mark.parametrize("reason", ["ABANDONED", "DRAINING", "STATE_UNAVAILABLE"])
def test_a_request_id_may_replace_a_generation_that_had_no_chance(reason: str) -> None:
    """After an end for lack of a reader, server or disk, the request id starts another generation."""
    history = good()
    for generation, outcome in (("aa.3", reason), ("aa.4", "SUCCEEDED")):
        reader = history.reader(request_id="again")
        reader.saw(generation, 1, "QUEUED", 0)
        log(history, generation, outcome)
        reader.ended(outcome)
    assert violations(history) == []


def test_the_request_id_of_a_dropped_generation_is_free() -> None:
    """When the server no longer retains a generation, its request id may start another one."""
    history = good()
    one_request_id_two_generations(history)
    history.dropped(A)
    assert violations(history) == []


def test_an_end_that_was_not_persisted_may_change() -> None:
    """If the server reports to readers and in the log that an end is not durable, another end may follow."""
    history = good()
    for outcome, persisted in (("SUCCEEDED", False), (CRASHED, True)):
        reader = history.reader()
        reader.saw("aa.3", 1, "QUEUED", 0)
        history.add(Logged(generation="aa.3", event="generation ended", outcome=outcome, persisted=persisted))
        reader.ended(outcome, persisted=persisted)
    assert violations(history) == []


def test_log_lines_are_read_as_facts() -> None:
    """Only JSON lines count; the end of a generation and injected faults are recognised."""
    history = History()
    line = {"event": "generation ended", "generation": A, "outcome": "succeeded", "level": "info"}
    lost = {**line, "not_persisted": True}
    fault = {"event": "fault injected", "failpoint": "store.end", "action": "raise"}
    history.log(["no JSON", json.dumps(line), json.dumps(lost), json.dumps(fault)])
    assert history.facts[0] == Logged(generation=A, event="generation ended", outcome="SUCCEEDED")
    assert history.facts[1] == Logged(generation=A, event="generation ended", outcome="SUCCEEDED", persisted=False)
    assert history.tried == {"fault store.end raise": 1}


async def test_rows_of_the_store_are_read_as_facts(tmp_path) -> None:
    """A finished generation has its outcome and the digest of its image."""
    job = Job("a cat", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")
    async with (
        Store.opened(tmp_path) as store,
        running_runtime(FakeEngine(), store=store) as runtime,
        runtime.generations.start(job, DeliveryOptions("me", request_id="r")) as reader,
    ):
        updates = [update async for update, _ in reader]
    history = History()
    await history.store(tmp_path)
    (row,) = history.facts
    assert isinstance(row, Stored)
    assert (row.caller, row.request_id, row.outcome) == ("me", "r", "SUCCEEDED")
    reader = history.reader()
    reader.saw(row.generation, 1, "succeeded", 3)
    end = updates[-1].state.end
    assert isinstance(end, Succeeded)
    reader.ended(image=end.image.data)
    assert violations(history) == []
