"""The event log: what a subscriber can rely on, for any order of events."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server import errors
from calotype_server.generations.event_log import EventLog, State, Update, advance
from calotype_server.types import (
    Decoding,
    Denoising,
    EncodedImage,
    EncodingPrompt,
    Failed,
    Notice,
    Noticed,
    Phase,
    PreviewMethod,
    PreviewReady,
    Queued,
    Succeeded,
    Timings,
    Withdrawn,
)
from support.engine.fake_engine import flat_pixels

PIXELS = flat_pixels(1, 1, 0)
IMAGE = EncodedImage("png", 1, 1, b"png")


@pytest.fixture
def subscribe():
    """Subscribes to a log until the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda log: stack.enter_context(log.subscribe())


def preview(step: int, total: int = 5, skipped: int = 0) -> PreviewReady:
    """Returns a preview of a step."""
    return PreviewReady(step, total, PIXELS, PreviewMethod.HEAD, skipped)


steps = st.integers(0, 5)
progress_events = st.one_of(
    st.builds(Queued, st.integers(1, 9)),
    st.just(EncodingPrompt()),
    st.builds(Denoising, steps, st.just(5), st.integers(0, 2)),
    st.builds(preview, steps, st.just(5), st.integers(0, 2)),
    st.just(Withdrawn()),
    st.just(Decoding()),
)
ends = st.one_of(
    st.just(Succeeded(IMAGE, Timings())),
    st.builds(
        Failed,
        st.sampled_from([errors.Cancelled("gone"), errors.GenerationFailed("broken")]),
        st.just(Timings()),
    ),
)


@given(st.lists(st.one_of(progress_events, ends)))
def test_state_only_moves_forward(events: list) -> None:
    """Phase, step and sequence never decrease, each change increments the sequence, and the end is final."""
    state = State()
    for event in events:
        later = advance(state, event)
        assert (later is state) or later.sequence == state.sequence + 1
        assert later.phase >= state.phase
        assert later.step >= state.step
        assert later.withdrawn >= state.withdrawn
        lost = getattr(event, "skipped", 0) if state.end is None else 0
        assert later.previews_skipped == state.previews_skipped + lost
        assert later.phase.is_end == (later.end is not None)
        if state.end is not None:
            assert later is state
        state = later


def test_later_warnings_are_added() -> None:
    """A warning during the generation follows those of the prompt, in any phase, and changes nothing else."""
    first, second = Notice("PROMPT_TRUNCATED", "long"), Notice("DECODED_IN_TILES", "tiles")
    state = advance(State(), EncodingPrompt((first,)))
    for event in (Denoising(0, 4), Decoding()):
        state = advance(state, event)
        warned = advance(state, Noticed((second,)))
        assert warned.notices == (first, second)
        assert (warned.phase, warned.step, warned.sequence) == (state.phase, state.step, state.sequence + 1)


@given(st.lists(st.one_of(progress_events, st.just("read")), max_size=30), ends)
def test_a_reader_of_any_speed_gets_the_newest_and_always_the_end(script: list, end) -> None:
    """Sequences rise, each preview is delivered once or counted as dropped, and the end arrives."""

    async def scenario() -> tuple[list[Update], int]:
        log = EventLog()
        updates: list[Update] = []
        published = 0
        with log.subscribe() as subscription:
            for action in [*script, end]:
                if action == "read":
                    if log.state.sequence > (updates[-1].state.sequence if updates else 0):
                        updates.append(await anext(subscription))
                    continue
                before = log.state
                log.publish(action)
                published += isinstance(action, PreviewReady) and log.state is not before
            updates.extend([update async for update in subscription])
        return updates, published

    updates, previews_published = asyncio.run(scenario())
    sequences = [update.state.sequence for update in updates]
    assert sequences == sorted(set(sequences))
    assert updates[-1].state.end == end
    assert sum(update.state.end is not None for update in updates) == 1
    delivered = [update.preview for update in updates if update.preview is not None]
    assert len(delivered) + updates[-1].previews_dropped - updates[-1].state.previews_skipped == previews_published
    assert len({id(preview) for preview in delivered}) == len(delivered)


async def test_an_unread_preview_is_replaced_and_counted(subscribe) -> None:
    """A reader that misses three previews gets the last one and the number of dropped ones, 2."""
    log = EventLog()
    log.publish(Queued(1))
    subscription = subscribe(log)
    assert (await anext(subscription)).state.queue_position == 1
    for step in (1, 2, 3):
        log.publish(preview(step))
    update = await anext(subscription)
    assert update.preview is not None
    assert (update.preview.step, update.previews_dropped, update.state.step) == (3, 2, 3)
    log.publish(Succeeded(IMAGE, Timings()))
    assert [update.state.phase async for update in subscription] == [Phase.SUCCEEDED]


async def test_a_late_preview_does_not_change_the_phase() -> None:
    """The preview of the last step may arrive during decoding; the phase does not change."""
    log = EventLog()
    log.publish(Denoising(4, 5))
    log.publish(Decoding())
    log.publish(preview(5))
    assert (log.state.phase, log.state.step) == (Phase.DECODING, 5)


@pytest.mark.parametrize("late", [preview(3, skipped=2), Denoising(3, 5, 2)])
def test_a_late_event_only_adds_its_dropped_previews(late) -> None:
    """A preview that arrives after later steps changes neither step nor phase; its skipped previews are added."""
    state = advance(advance(State(), Denoising(5, 5, 1)), Decoding())
    later = advance(state, late)
    assert (later.phase, later.step, later.previews_skipped) == (Phase.DECODING, 5, 3)
    assert later.sequence == state.sequence + 1
    assert advance(state, Denoising(3, 5)) is state


def test_a_withdrawal_is_reported_once() -> None:
    """It does not change the phase, and nothing reverts it."""
    state = advance(advance(State(), Denoising(5, 5)), Withdrawn())
    assert (state.withdrawn, state.phase, state.sequence) == (True, Phase.DENOISING, 2)
    assert advance(state, Withdrawn()) is state
    ended = advance(state, Failed(errors.ContentWithheld("No."), Timings()))
    assert ended.withdrawn
    assert advance(ended, Withdrawn()) is ended


async def test_a_withdrawn_preview_never_reaches_a_reader(subscribe) -> None:
    """A preview that is unread when the safety checker objects is counted as dropped, and not sent."""
    log = EventLog()
    log.publish(Denoising(0, 5))
    subscription = subscribe(log)
    await anext(subscription)
    log.publish(preview(4))
    log.publish(Withdrawn())
    update = await anext(subscription)
    assert (update.state.withdrawn, update.preview, update.previews_dropped) == (True, None, 1)
    log.publish(preview(5))
    assert (await anext(subscription)).preview is None
    log.publish(Failed(errors.ContentWithheld("No."), Timings()))
    assert [update.previews_dropped async for update in subscription] == [2]


async def test_skipped_and_unread_previews_are_counted_together(subscribe) -> None:
    """Previews dropped by the preview thread and by a slow reader add up to one number."""
    log = EventLog()
    subscription = subscribe(log)
    log.publish(Queued(1))
    await anext(subscription)
    log.publish(preview(2, skipped=1))
    log.publish(preview(4, skipped=1))
    log.publish(Denoising(5, 5, skipped=1))
    update = await anext(subscription)
    assert (update.preview.step, update.state.step, update.previews_dropped) == (4, 5, 4)
    log.publish(Succeeded(IMAGE, Timings()))
    assert [update.state.phase async for update in subscription] == [Phase.SUCCEEDED]


async def test_events_from_threads_reach_a_waiting_reader_in_order(subscribe) -> None:
    """Two threads publish while the reader waits in the event loop; it sees rising sequence numbers and the end."""
    log = EventLog()

    def publish(end: bool) -> None:
        for step in range(200):
            log.publish(Denoising(step, 200))
        if end:
            log.publish(Succeeded(IMAGE, Timings()))

    first = threading.Thread(target=publish, args=(False,))
    first.start()
    threading.Thread(target=lambda: (first.join(), publish(True))).start()
    sequences = [update.state.sequence async for update in subscribe(log)]
    assert sequences == sorted(set(sequences))
    assert log.state.phase is Phase.SUCCEEDED


async def test_every_subscription_has_its_own_slot(subscribe) -> None:
    """A slow subscriber loses only its own previews."""
    log = EventLog()
    log.publish(Queued(1))
    quick, slow = subscribe(log), subscribe(log)
    await anext(quick)
    await anext(slow)
    for step in (1, 2):
        log.publish(preview(step, 2))
        assert (await anext(quick)).previews_dropped == 0
    assert (await anext(slow)).previews_dropped == 1
    log.publish(Failed(errors.Cancelled("gone"), Timings()))
    assert [u.state.phase async for u in quick] == [u.state.phase async for u in slow] == [Phase.CANCELLED]


def test_publishing_after_the_loop_is_closed_does_nothing() -> None:
    """A preview thread that finishes after the event loop was closed must not fail."""

    async def make() -> EventLog:
        return EventLog()

    log = asyncio.run(make())
    log.publish(Queued(1))
    assert log.state.queue_position == 1


async def test_many_readers_are_woken_in_rounds(subscribe) -> None:
    """More readers mean fewer wake-ups: each gets the newest preview, the number of dropped ones, and the end."""

    class Clock:
        now = 100.0
        due: Any = None

        def __init__(self, loop) -> None:
            self.call_soon_threadsafe = loop.call_soon_threadsafe

        def time(self) -> float:
            return self.now

        def call_at(self, when: float, callback):
            self.due = (when, callback)
            return asyncio.get_running_loop().call_later(1e9, callback)

    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def read(seen: list) -> None:
        async for update in subscribe(log):
            seen.append(update)

    log = EventLog()
    loop: Any = Clock(asyncio.get_running_loop())
    log._loop = clock = loop
    all_seen = [[] for _ in range(40)]
    readers = [asyncio.create_task(read(seen)) for seen in all_seen]
    await settle()
    for step in (1, 2, 3):
        log.publish(preview(step))
        await settle()
    assert all(seen[-1].preview.step == 1 for seen in all_seen)
    clock.now, wake = clock.due
    assert clock.now > 100
    wake()
    await settle()
    assert all((seen[-1].preview.step, seen[-1].previews_dropped) == (3, 1) for seen in all_seen)
    log.publish(preview(4))
    log.publish(Succeeded(IMAGE, Timings()))
    await asyncio.gather(*readers)
    assert all(seen[-1].state.end is not None for seen in all_seen)
