"""The event log of one generation: events come from any thread, subscribers read in the event loop.

A subscriber has one slot for the newest preview and otherwise sees the newest state, so that a slow reader costs one
preview of memory, loses previews (counted), and never loses the end. Modelled on vLLM's `RequestOutputCollector`.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.engine.preview.cadence import PreviewSchedule
from calotype_server.types import (
    Decoding,
    Denoising,
    EncodingPrompt,
    Event,
    Failed,
    Heartbeat,
    Notice,
    Phase,
    PreviewMethod,
    PreviewOptions,
    PreviewReady,
    Queued,
    Succeeded,
    Withdrawn,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["EventLog", "State", "Update", "advance"]

_READER_SECONDS = 0.001
"""Time between two rounds of waking the readers, for each of them. A message takes about 0.1 ms of the event loop,
which shares Python's lock with the denoiser: so many readers get fewer previews before they slow it down."""

_FEW_READERS = 8
"""Up to which nobody waits."""


@dataclass(frozen=True, slots=True)
class State:
    """All events so far, folded into one.

    `sequence` counts the events that changed something; `end` is the last of them, once it came.
    """

    sequence: int = 0
    phase: Phase = Phase.QUEUED
    step: int = 0
    total_steps: int = 0
    queue_position: int = 0
    estimated_remaining: float | None = None
    notices: tuple[Notice, ...] = ()
    previews_skipped: int = 0
    withdrawn: bool = False
    finished_early: bool = False
    end: Succeeded | Failed | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What a subscriber reads: the newest state, the newest preview not read yet, and how many were not sent."""

    state: State
    preview: PreviewReady | None
    previews_dropped: int


def advance(state: State, event: Event) -> State:
    """Returns the state after `event`, or `state` itself when the event comes too late to matter."""
    if state.phase.is_end:
        return state
    later = replace(state, sequence=state.sequence + 1, queue_position=0)
    match event:
        case Queued(position, remaining) if state.phase == Phase.QUEUED:
            return replace(later, queue_position=position, estimated_remaining=remaining)
        case EncodingPrompt(notices, remaining) if state.phase == Phase.QUEUED:
            return replace(later, phase=Phase.ENCODING_PROMPT, notices=notices, estimated_remaining=remaining)
        case Denoising(step, total, skipped, remaining):
            if state.phase <= Phase.DENOISING and step >= state.step:
                later = replace(
                    later, phase=Phase.DENOISING, step=step, total_steps=total, estimated_remaining=remaining
                )
            elif not skipped:
                return state
            return replace(later, previews_skipped=state.previews_skipped + skipped)
        case PreviewReady(step, total, skipped=skipped, estimated_remaining=remaining):
            reached = advance(state, Denoising(step, total, skipped, remaining))
            # A preview that comes after the next step was told changes nothing in the state but its number.
            return replace(reached, sequence=later.sequence)
        case Withdrawn() if not state.withdrawn:
            return replace(later, withdrawn=True)
        case Decoding(early, remaining) if state.phase < Phase.DECODING:
            step = state.step if early else state.total_steps
            return replace(later, phase=Phase.DECODING, step=step, finished_early=early, estimated_remaining=remaining)
        case Heartbeat(seconds):
            left = state.estimated_remaining
            left = None if left is None else max(0.0, left - seconds)
            return replace(later, queue_position=state.queue_position, estimated_remaining=left)
        case Succeeded():
            step = state.step if event.finished_early else state.total_steps
            return replace(
                later,
                phase=Phase.SUCCEEDED,
                step=step,
                finished_early=event.finished_early,
                estimated_remaining=None,
                end=event,
            )
        case Failed(error):
            phase = Phase.CANCELLED if isinstance(error, errors.Cancelled) else Phase.FAILED
            return replace(later, phase=phase, estimated_remaining=None, end=event)
    return state


class EventLog:
    """Hands the events of one generation from the threads that publish to the subscribers in the event loop.

    Args:
        state: What is known already.
    """

    def __init__(self, state: State = State()) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._state = state
        self._subscriptions: set[_Subscription] = set()
        self._newest: tuple[int, PreviewReady] | None = None
        """The newest preview and the number of its event, for readers who come later."""
        self._next_round = 0.0
        self._round: asyncio.TimerHandle | None = None

    @property
    def state(self) -> State:
        """The newest state."""
        return self._state

    @property
    def newest_preview(self) -> tuple[int, PreviewReady] | None:
        """The newest preview and the number of its event; None before the first, after the end, and when withdrawn."""
        with self._lock:
            return self._newest

    @property
    def held_bytes(self) -> int:
        """Bytes of the previews that are kept for readers, each counted once."""
        with self._lock:
            held = [each.unread for each in self._subscriptions]
            if self._newest is not None:
                held.append(self._newest[1])
        return sum({id(each): len(each.pixels.data) for each in held if each is not None}.values())

    def publish(self, event: Event) -> None:
        """Adds an event; from any thread. Events after the end, or overtaken by later ones, are ignored."""
        with self._lock:
            state = advance(self._state, event)
            if state is self._state:
                return
            self._state = state
            if isinstance(event, PreviewReady):
                self._newest = state.sequence, event
                for subscription in self._subscriptions:
                    subscription.put(event)
            elif state.end is not None or state.withdrawn:
                self._newest = None
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            # The loop is closed: the process is ending and nobody reads any more.
            return

    def _wake(self) -> None:
        """Wakes the readers, when there are many of them not more often than the event loop can bear."""
        now, readers = self._loop.time(), len(self._subscriptions)
        if readers > _FEW_READERS and self._state.end is None and now < self._next_round:
            if self._round is None:
                self._round = self._loop.call_at(self._next_round, self._wake)
            return
        if self._round is not None:
            self._round.cancel()
            self._round = None
        self._next_round = now + readers * _READER_SECONDS
        for subscription in self._subscriptions:
            subscription.woken.set()

    async def follow(self, after: int = 0, options: PreviewOptions | None = None) -> AsyncIterator[Update]:
        """Yields the newest state whenever it changed, from the current one to the end, which is always yielded.

        Args:
            after: Number of the last event that the reader knows; the newest preview comes again if it is younger.
            options: Which previews this reader wants of those that are made; None for all.
        """
        with self._lock:
            # A number that this log has not reached is from another one, which is lost.
            known = after if after <= self._state.sequence and self._state.end is None else 0
            subscription = _Subscription(known, options)
            if self._newest is not None and self._newest[0] > known:
                subscription.put(self._newest[1])
            self._subscriptions.add(subscription)
        try:
            while True:
                with self._lock:
                    update = subscription.take(self._state)
                if update is None:
                    await subscription.woken.wait()
                    continue
                yield update
                if update.state.end is not None:
                    return
        finally:
            with self._lock:
                self._subscriptions.discard(subscription)


class _Subscription:
    """One reader's place: how far it has read, and its slot. Guarded by the log's lock, except `woken`."""

    def __init__(self, sequence: int, options: PreviewOptions | None) -> None:
        self.woken = asyncio.Event()
        self._sequence = sequence
        self._cadence = None if options is None else PreviewSchedule(options)
        self._wanted = options is None or options.method is not PreviewMethod.NONE
        self._slot: PreviewReady | None = None
        self._dropped = 0

    @property
    def unread(self) -> PreviewReady | None:
        """The preview in the slot."""
        return self._slot

    def put(self, preview: PreviewReady) -> None:
        """Replaces an unread preview, if this one is wanted."""
        if not self._wanted:
            return
        if self._cadence is not None and not self._cadence.due(preview.step, preview.total_steps, 1):
            return
        self._dropped += self._slot is not None
        self._slot = preview

    def take(self, state: State) -> Update | None:
        """Returns what is new, or None after arming `woken`."""
        if state.sequence == self._sequence:
            self.woken.clear()
            return None
        self._sequence = state.sequence
        preview, self._slot = self._slot, None
        if preview is not None and (state.end is not None or state.withdrawn):
            # The final image supersedes it, and an error needs no picture.
            self._dropped += 1
            preview = None
        return Update(state, preview, self._dropped + state.previews_skipped)
