"""Decides how to resume a generation after an error. Does no I/O and never waits; both clients use it.

A broken stream does not end a generation. The server keeps a generation without a reader for its disconnect grace, so
the client calls `Watch` with the last sequence number that it has. If the server lost the generation, for example in a
restart, the client calls `Generate` again with the seed in use. `Continuity` then joins the messages of all calls.

- Waits between attempts, and when to give up: see `Waits`.
- Because of the grace, closing a call does not cancel the generation. `PendingCancels` does that when a caller leaves.
- The first message can be lost, too. Each request has a `request_id`, so repeating it never starts a second generation.
- A server that drains, or whose disconnect grace expires, ends a generation that its caller did not cancel. The caller
  does not see that end; the client requests the same image again.
- Before the first contact there is nothing to lose: if the server cannot be reached or rejects the request, the caller
  gets the error immediately. Later, both are retried, after at least the delay that the server asks for. A server that
  is loading is waited for at any time.
- With several servers, another server can replace one that is lost or not ready, at first contact as well.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from .._constants import DISCONNECT_GRACE_SECONDS
from .._errors import CalotypeError, Cancelled, DeadlineExceeded, NotFound, Unavailable
from .._status import from_error_message
from ..v1 import calotype_pb2 as v1
from .continuity import ENDS, Continuity
from .waits import ABANDONED, Waits, is_loading, too_late

if TYPE_CHECKING:
    from .backoff import RetryPolicy

__all__ = ["NEWEST_GENERATIONS", "Resumption", "make_resumable"]

NEWEST_GENERATIONS = v1.ListGenerationsRequest(page_size=100)
"""Finds a generation whose id is not known yet: it is among the newest."""

_OTHER_REPLICA = "OTHER_REPLICA"


def make_resumable(request: v1.GenerateRequest) -> None:
    """Sets the fields that resuming needs, unless the caller set them: a request id, and a grace for CANCEL."""
    request.request_id = request.request_id or uuid.uuid4().hex
    if request.on_disconnect != v1.DISCONNECT_POLICY_KEEP and not request.HasField("disconnect_grace"):
        request.disconnect_grace.CopyFrom(Duration(seconds=DISCONNECT_GRACE_SECONDS))


class Resumption:
    """Chooses the next request of one generation, and which messages are news to the caller.

    Usage: make a call for `request` with the deadline `time_left`, and pass each message to `take`. When the call
    breaks, `lost` returns how long to wait before the next call, or the error to raise.

    Attributes:
        request: The request of the next call.
        generation_id: Id of the generation on the server. None before the first message.
        unsettled: Whether the server may have a generation that has not ended.
        last_loss: The error of the last call. None once the next call brings news.
    """

    def __init__(
        self, request: v1.GenerateRequest | v1.WatchRequest, policy: RetryPolicy, timeout: float | None = None
    ) -> None:
        self.request = request
        self.generation_id: str | None = None
        self.unsettled = True
        self.last_loss: CalotypeError | None = None
        self._original = request
        self._policy = policy
        self._waits = Waits(policy, timeout)
        self._seed = 0  # in use, once a message has arrived
        self._has_searched = False  # whether all servers were asked for a watched generation
        self._superseded_by: CalotypeError | None = None  # the end that a new generation replaces
        if isinstance(request, v1.WatchRequest):
            self.generation_id = request.generation_id
            self._continuity = Continuity(request.generation_id, request.after_sequence)
        else:
            self._continuity = Continuity()

    @property
    def time_left(self) -> float | None:
        """Seconds until the deadline, at least 0. None without a deadline."""
        return self._waits.time_left

    @property
    def leaving_cancels(self) -> bool:
        """Whether leaving cancels the generation: this client started it, without `on_disconnect="keep"`."""
        request = self._original
        return isinstance(request, v1.GenerateRequest) and request.on_disconnect != v1.DISCONNECT_POLICY_KEEP

    @property
    def lingers(self) -> bool:
        """Whether the generation continues for a while after its call is closed."""
        if not self.leaving_cancels or not isinstance(self._original, v1.GenerateRequest):
            return True
        grace = self._original.disconnect_grace
        return bool(grace.seconds or grace.nanos)

    def find_id(self, answer: v1.ListGenerationsResponse) -> str | None:
        """Finds the generation's id by its request id, for a generation without a first message. None if absent."""
        request_id = getattr(self.request, "request_id", "")
        found = (summary.generation_id for summary in answer.generations if summary.request_id == request_id)
        return next(found, None) if request_id else None

    def take(self, message: v1.Progress) -> v1.Progress | None:
        """Takes a message of the current call.

        Returns:
            The message, edited to continue the previous ones, or None when it holds no news for the caller.
        """
        self._waits.hear()
        self.generation_id, self._seed = message.generation_id, message.seed
        if message.phase in ENDS:
            self.settle()
            self._superseded_by = self._replaceable_end(message)
            if self._superseded_by is not None:
                return None
        news = self._continuity.join(message)
        if news is not None:
            self._waits.reset()
            self.last_loss = None
        return news

    def settle(self) -> None:
        """Records that the server has no running generation of this request."""
        self.unsettled = False

    def lost(self, error: CalotypeError) -> float | CalotypeError:
        """Takes the error that ended a call before the generation's end was shown.

        Returns:
            Seconds to wait before the next call, or the error with which the generation ends for the caller.
        """
        self._continuity.cut()
        if isinstance(error, DeadlineExceeded):
            self.unsettled = self.generation_id is not None or not error.reason
            return error if self.last_loss is None else too_late(self.last_loss)
        superseded_by, self._superseded_by = self._superseded_by, None
        if superseded_by is not None:
            self._generate_again()
            error = superseded_by
        elif isinstance(error, NotFound) and isinstance(self.request, v1.WatchRequest) and self._generate_again():
            return 0.0
        elif self._policy.is_balanced and error.reason == _OTHER_REPLICA and not self._has_searched:
            self._has_searched = True
            return 0.0
        verdict = self._waits.after(error)
        if isinstance(verdict, CalotypeError):
            if not isinstance(verdict, DeadlineExceeded):
                self.unsettled = self.generation_id is not None and not isinstance(error, NotFound)
            return verdict
        self.last_loss = error
        if self.generation_id is not None:
            self.request = self._watch_request(self.generation_id)
        return verdict

    def _watch_request(self, generation_id: str) -> v1.WatchRequest:
        preview = self._original.preview if isinstance(self._original, v1.WatchRequest) else None
        after = self._continuity.sequence
        return v1.WatchRequest(generation_id=generation_id, after_sequence=after, preview=preview)

    def _replaceable_end(self, message: v1.Progress) -> CalotypeError | None:
        """Returns the error of an end that the server caused, not the request, so that a new generation may follow."""
        if isinstance(self._original, v1.WatchRequest) or not message.HasField("error") or not self._policy.retries:
            return None
        error = from_error_message(message.error, Cancelled)
        if is_loading(error):
            return error
        is_replaceable = isinstance(error, Unavailable) or error.reason == ABANDONED
        return error if is_replaceable and not self._waits.exhausted else None

    def _generate_again(self) -> bool:
        """Makes the next request the original one with the seed in use. Returns False for a watched generation."""
        if isinstance(self._original, v1.WatchRequest):
            return False
        self.request = v1.GenerateRequest()
        self.request.CopyFrom(self._original)
        self.request.seed = self._seed
        self.generation_id = None
        self.unsettled = True
        return True
