"""The event log of one generation: any thread publishes events, subscribers read them in the event loop.

A subscriber holds the newest unread preview and otherwise sees only the newest state. So a slow reader costs the memory
of one preview, loses previews (which are counted), and never loses the end. Modelled on vLLM's
`RequestOutputCollector`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

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
    Noticed,
    Phase,
    PreviewMethod,
    PreviewOptions,
    PreviewReady,
    Queued,
    Succeeded,
    Withdrawn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["EventLog", "State", "Subscription", "Update", "advance"]

_READER_SECONDS = 0.002
"""Least time between two wake-ups, per reader. A message takes about 0.1 ms of the event loop, which shares Python's
lock with the denoiser; so many readers get fewer previews instead of slowing it down."""

_FEW_READERS = 8
"""Up to this number of readers, wake-ups are not delayed."""


@dataclass(frozen=True, slots=True)
class State:
    """The result of all events so far.

    `sequence` counts the events that changed something. `end` is the last of them, or None before the end.
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
    """An item of a subscription: the newest state, the newest unread preview, and the number of unsent previews."""

    state: State
    preview: PreviewReady | None
    previews_dropped: int


def advance(state: State, event: Event) -> State:
    """Returns the state after `event`, or `state` itself if the event is too late to change anything."""
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
            # A preview that arrives after the next step was reported changes only the sequence number.
            return replace(reached, sequence=later.sequence)
        case Noticed(notices):
            return replace(later, notices=(*state.notices, *notices))
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
    """Passes the events of one generation from the publishing threads to subscribers in the event loop.

    Args:
        state: The initial state.
    """

    def __init__(self, state: State = State()) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._state = state
        self._subscriptions: set[Subscription] = set()
        self._newest: tuple[int, PreviewReady] | None = None
        """The newest preview and the sequence number of its event, for new subscribers."""
        self._next_round = 0.0
        self._round: asyncio.TimerHandle | None = None

    @property
    def state(self) -> State:
        """The newest state."""
        return self._state

    @property
    def newest_preview(self) -> tuple[int, PreviewReady] | None:
        """The newest preview and its sequence number; None before the first, after the end, and when withdrawn."""
        with self._lock:
            return self._newest

    @property
    def held_bytes(self) -> int:
        """Bytes of the previews held for readers. Each preview counts once."""
        with self._lock:
            held = [each.unread for each in self._subscriptions]
            if self._newest is not None:
                held.append(self._newest[1])
        return sum({id(each): len(each.pixels.data) for each in held if each is not None}.values())

    def publish(self, event: Event) -> None:
        """Adds an event. Thread-safe. Ignores events after the end and events that are older than the state."""
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
            # The loop is closed: the process is ending and there are no readers.
            return

    def _wake(self) -> None:
        """Wakes the readers. With many readers, wake-ups are spaced out to protect the event loop."""
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

    @contextlib.contextmanager
    def subscribe(self, after: int = 0, options: PreviewOptions | None = None) -> Iterator[Subscription]:
        """Subscribes a reader for the duration of the block.

        Args:
            after: Sequence number of the last event that the reader knows. The newest preview is delivered if it is
                newer than that.
            options: Which previews the reader wants; None for all.
        """
        with self._lock:
            # A number that this log has not reached comes from another log, which was lost.
            known = after if after <= self._state.sequence and self._state.end is None else 0
            subscription = Subscription(self._take, known, options)
            if self._newest is not None and self._newest[0] > known:
                subscription.put(self._newest[1])
            self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            with self._lock:
                self._subscriptions.discard(subscription)

    def _take(self, subscription: Subscription) -> Update | None:
        with self._lock:
            return subscription.take(self._state)


class Subscription:
    """One reader's position in an event log. Iterate over it for the newest state whenever it changed, up to the end.

    The end is always delivered. Everything but iterating is guarded by the log's lock.

    Args:
        read: Returns what is new for this subscription, or None after clearing `woken`.
        sequence: Sequence number of the last event that the reader knows.
        options: Which previews the reader wants; None for all.

    Attributes:
        woken: Set when the log has changed.
    """

    def __init__(
        self, read: Callable[[Subscription], Update | None], sequence: int, options: PreviewOptions | None
    ) -> None:
        self.woken = asyncio.Event()
        self._read = read
        self._ended = False
        self._sequence = sequence
        self._schedule = None if options is None else PreviewSchedule(options)
        self._wanted = options is None or options.method is not PreviewMethod.NONE
        self._slot: PreviewReady | None = None
        self._dropped = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        if self._ended:
            raise StopAsyncIteration
        while (update := self._read(self)) is None:
            await self.woken.wait()
        self._ended = update.state.end is not None
        return update

    @property
    def unread(self) -> PreviewReady | None:
        """The preview that the reader has not read yet."""
        return self._slot

    def put(self, preview: PreviewReady) -> None:
        """Stores a preview for the reader if it is wanted, and drops an unread older one."""
        if not self._wanted:
            return
        if self._schedule is not None and not self._schedule.due(preview.step, preview.total_steps, 1):
            return
        self._dropped += self._slot is not None
        self._slot = preview

    def take(self, state: State) -> Update | None:
        """Returns what is new, or None after clearing `woken`."""
        if state.sequence == self._sequence:
            self.woken.clear()
            return None
        self._sequence = state.sequence
        preview, self._slot = self._slot, None
        if preview is not None and (state.end is not None or state.withdrawn):
            # The final image replaces the preview, and an error needs none.
            self._dropped += 1
            preview = None
        return Update(state, preview, self._dropped + state.previews_skipped)
