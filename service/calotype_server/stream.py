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
from calotype_server.types import (
    Decoding,
    Denoising,
    EncodingPrompt,
    Event,
    Failed,
    Notice,
    Phase,
    PreviewReady,
    Queued,
    Succeeded,
    Withdrawn,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["EventLog", "State", "Update", "advance"]


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
        case Decoding(remaining) if state.phase < Phase.DECODING:
            return replace(later, phase=Phase.DECODING, step=state.total_steps, estimated_remaining=remaining)
        case Succeeded():
            return replace(later, phase=Phase.SUCCEEDED, step=state.total_steps, estimated_remaining=None, end=event)
        case Failed(error):
            phase = Phase.CANCELLED if isinstance(error, errors.Cancelled) else Phase.FAILED
            return replace(later, phase=phase, estimated_remaining=None, end=event)
    return state


class EventLog:
    """Hands the events of one generation from the threads that publish to the subscribers in the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._state = State()
        self._subscriptions: set[_Subscription] = set()

    @property
    def state(self) -> State:
        """The newest state."""
        return self._state

    def publish(self, event: Event) -> None:
        """Adds an event; from any thread. Events after the end, or overtaken by later ones, are ignored."""
        with self._lock:
            state = advance(self._state, event)
            if state is self._state:
                return
            self._state = state
            if isinstance(event, PreviewReady):
                for subscription in self._subscriptions:
                    subscription.put(event)
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            # The loop is closed: the process is ending and nobody reads any more.
            return

    def _wake(self) -> None:
        for subscription in self._subscriptions:
            subscription.woken.set()

    async def follow(self) -> AsyncIterator[Update]:
        """Yields the newest state whenever it changed, from the current one to the end, which is always yielded."""
        subscription = _Subscription()
        with self._lock:
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

    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self._sequence = 0
        self._slot: PreviewReady | None = None
        self._dropped = 0

    def put(self, preview: PreviewReady) -> None:
        """Replaces an unread preview."""
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
