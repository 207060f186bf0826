"""The state of a fake server: its generations, and the connections that a test breaks. For `calotype.testing`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .._errors import AlreadyExists, Cancelled, NotFound
from ..v1 import calotype_pb2 as v1
from .generation import FakeGeneration

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from .generation import Script

__all__ = ["ConnectionCut", "FakeState"]


class ConnectionCut(Exception):
    """The test has cut this connection."""


class FakeState:
    """The generations of a fake server. Safe to share between threads.

    Args:
        script: The steps, previews and failures of every generation.
        drop_at: Steps at which all connections are cut, once each.
        lose_at: Steps at which all connections are cut and all generations are lost, once each.

    Attributes:
        requests: The requests to generate, oldest first.
        watched: The requests to watch, oldest first.
        cancelled: Ids of the cancelled generations, oldest first.
    """

    def __init__(self, script: Script, drop_at: Collection[int] = (), lose_at: Collection[int] = ()) -> None:
        self.script = script
        self.requests: list[v1.GenerateRequest] = []
        self.watched: list[v1.WatchRequest] = []
        self.cancelled: list[str] = []
        self._generations: dict[str, FakeGeneration] = {}
        self._cancelled_groups: set[str] = set()
        self._drops, self._losses = set(drop_at), set(lose_at)
        self._cuts = 0
        self._released = False
        self._changed = threading.Condition()

    def generate(self, request: v1.GenerateRequest) -> tuple[FakeGeneration, int]:
        """Starts a generation, or finds the one with the same request id.

        Returns:
            The generation, and the index of the reader's first event.

        Raises:
            CalotypeError: The script rejects the request, its id belongs to another request, or its group is cancelled.
        """
        with self._changed:
            self.requests.append(request)
            if self.script.error is not None and self.script.fail_at is None:
                raise self.script.error
            generation = self._find_request(request)
            if generation is None:
                if request.group in self._cancelled_groups:
                    raise Cancelled("The group was cancelled.", reason="GROUP_CANCELLED")
                generation = FakeGeneration(len(self.requests), request, self.script)
                self._generations[generation.id] = generation
            return generation, generation.position(0) if generation.ended else 0

    def watch(self, request: v1.WatchRequest) -> tuple[FakeGeneration, int]:
        """Finds a generation. Returns it, and the index of the reader's first event.

        Raises:
            NotFound: There is no such generation.
        """
        with self._changed:
            self.watched.append(request)
            generation = self._find(request.generation_id)
            return generation, generation.position(request.after_sequence)

    def cancel(self, generation_id: str) -> tuple[v1.Phase.ValueType, bool]:
        """Cancels a generation. Returns its phase before, and whether this call cancels it.

        Raises:
            NotFound: There is no such generation.
        """
        with self._changed:
            generation = self._find(generation_id)
            found = generation.phase
            return found, self._cancel(generation)

    def cancel_group(self, group: str) -> int:
        """Cancels all members of a group, and rejects later ones. Returns the number that this call cancels.

        Raises:
            NotFound: There is no such group.
        """
        with self._changed:
            self._cancelled_groups.add(group)
            members = [each for each in self._generations.values() if each.request.group == group]
            if not members:
                raise NotFound(f"There is no group {group!r}.", reason="GROUP_NOT_FOUND")
            return sum(map(self._cancel, members))

    def finish(self, generation_id: str) -> v1.Phase.ValueType:
        """Finishes a generation early. Returns its phase before.

        Raises:
            NotFound: There is no such generation.
        """
        with self._changed:
            generation = self._find(generation_id)
            found = generation.phase
            generation.finish()
            self._changed.notify_all()
            return found

    def summaries(self) -> Sequence[v1.GenerationSummary]:
        """Lists all generations, newest first."""
        with self._changed:
            return [generation.summary() for generation in reversed(self._generations.values())]

    def add_reader(self, generation: FakeGeneration) -> int:
        """Counts a reader. Returns the number to pass to `next_event`."""
        with self._changed:
            generation.add_reader()
            return self._cuts

    def remove_reader(self, generation: FakeGeneration) -> None:
        """Stops counting a reader. After the last one, applies the request's disconnect policy."""
        with self._changed:
            generation.remove_reader()
            grace = generation.request.disconnect_grace
            if generation.has_readers:
                return
            if generation.request.on_disconnect == v1.DISCONNECT_POLICY_KEEP:
                while self._may_advance(generation):
                    generation.advance()
            elif not (grace.seconds or grace.nanos):
                self._cancel(generation)
            self._changed.notify_all()

    def next_event(
        self, generation: FakeGeneration, index: int, cuts: int, is_active: Callable[[], bool]
    ) -> v1.Progress | None:
        """Waits for an event. Returns a copy of it, or None after the last one or when the reader has left.

        Args:
            generation: The generation to read.
            index: Index of the event.
            cuts: From `add_reader`.
            is_active: Returns whether the reader is still there.

        Raises:
            ConnectionCut: The connection was cut since `add_reader`.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    index < len(generation.events)
                    or generation.ended
                    or self._may_advance(generation)
                    or self._cuts != cuts
                    or not is_active()
                )
            )
            if self._cuts != cuts:
                raise ConnectionCut
            if not is_active() or (generation.ended and index >= len(generation.events)):
                return None
            if index == len(generation.events):
                generation.advance()
            message = v1.Progress()
            message.CopyFrom(generation.events[index])
            return message

    def sent(self, message: v1.Progress) -> None:
        """Records that an event was sent, and cuts connections if the test wants it at this step."""
        with self._changed:
            if message.phase != v1.PHASE_DENOISING or message.step not in self._drops | self._losses:
                return
            if message.step in self._losses:
                self._generations.clear()
            self._drops.discard(message.step)
            self._losses.discard(message.step)
            self.drop()

    def drop(self) -> None:
        """Cuts all connections of readers."""
        with self._changed:
            self._cuts += 1
            self._changed.notify_all()

    def forget(self, generation_id: str) -> None:
        """Loses a generation. Its current readers can continue."""
        with self._changed:
            self._generations.pop(generation_id, None)

    def forget_all(self) -> None:
        """Loses all generations."""
        with self._changed:
            self._generations.clear()
            self._cancelled_groups.clear()

    def release(self) -> None:
        """Lets held generations continue, and holds no more of them."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def wait_cancelled(self, timeout: float, count: int) -> bool:
        """Waits up to `timeout` seconds until `count` generations are cancelled. Returns whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.cancelled) >= count, timeout)

    def _find(self, generation_id: str) -> FakeGeneration:
        generation = self._generations.get(generation_id)
        if generation is None:
            raise NotFound(f"There is no generation {generation_id!r}.", reason="GENERATION_NOT_FOUND")
        return generation

    def _find_request(self, request: v1.GenerateRequest) -> FakeGeneration | None:
        for generation in self._generations.values():
            if request.request_id and generation.request.request_id == request.request_id:
                if generation.request != request:
                    raise AlreadyExists("The id belongs to another request.", reason="REQUEST_ID_REUSED")
                return generation
        return None

    def _may_advance(self, generation: FakeGeneration) -> bool:
        return not generation.ended and (self._released or not generation.holds)

    def _cancel(self, generation: FakeGeneration) -> bool:
        cancels = generation.cancel()
        if cancels:
            self.cancelled.append(generation.id)
        self._changed.notify_all()
        return cancels
