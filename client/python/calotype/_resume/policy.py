"""Decides how to resume a generation after an error. Does no I/O and never waits; both clients use it.

A broken stream does not end a generation. The server keeps a generation without a reader for its disconnect grace, so
the client calls `Watch` with the last sequence number that it has. If the server lost the generation, for example in a
restart, the client calls `Generate` again with the seed in use. `Continuity` then joins the messages of all calls.

- Waits between attempts: see `RetryPolicy`.
- Because of the grace, closing a call does not cancel the generation. `PendingCancels` does that when a caller leaves.
- The first message can be lost, too. Each request has a `request_id`, so repeating it never starts a second generation.
- A server that drains, or whose disconnect grace expires, ends a generation that its caller did not cancel. The caller
  does not see that end; the client requests the same image again.
- Before the first contact there is nothing to lose: if the server cannot be reached or rejects the request, the caller
  gets the error immediately. Later, both are retried, after at least the delay that the server asks for.
- With several servers, another server can replace one that is lost or not ready, at first contact as well.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from .._constants import DISCONNECT_GRACE_SECONDS
from .._errors import CalotypeError, Cancelled, DeadlineExceeded, NotFound, StreamIncomplete, Unavailable
from .._status import from_error_message
from ..v1 import calotype_pb2 as v1
from .continuity import ENDS, Continuity

if TYPE_CHECKING:
    from .backoff import RetryPolicy

__all__ = ["NEWEST_GENERATIONS", "Resumption", "make_resumable"]

NEWEST_GENERATIONS = v1.ListGenerationsRequest(page_size=100)
"""Finds a generation whose id is not known yet: it is among the newest."""

_ABANDONED, _OTHER_REPLICA = "ABANDONED", "OTHER_REPLICA"

# gRPC's messages for a call that reached no server. After any other failure, a server may have received the request.
_UNREACHED = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "errors resolving",
    "DNS resolution failed",
)


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
        heard: Whether the current call has returned a message.
        last_loss: The error of the last call. None once the next call brings news.
    """

    def __init__(
        self, request: v1.GenerateRequest | v1.WatchRequest, policy: RetryPolicy, timeout: float | None = None
    ) -> None:
        self.request = request
        self.generation_id: str | None = None
        self.unsettled = True
        self.heard = False
        self.last_loss: CalotypeError | None = None
        self._original = request
        self._policy = policy
        self._deadline = None if timeout is None else policy.clock() + timeout
        self._seed = 0  # in use, once a message has arrived
        self._attempts = 0
        self._has_searched = False  # whether all servers were asked for a watched generation
        self._reached = False  # whether a call may have reached a server
        self._superseded_by: CalotypeError | None = None  # the end that a new generation replaces
        if isinstance(request, v1.WatchRequest):
            self.generation_id = request.generation_id
            self._continuity = Continuity(request.generation_id, request.after_sequence)
        else:
            self._continuity = Continuity()

    @property
    def time_left(self) -> float | None:
        """Seconds until the deadline, at least 0. None without a deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - self._policy.clock())

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
        self._reached = self.heard = True
        self.generation_id, self._seed = message.generation_id, message.seed
        if message.phase in ENDS:
            self.settle()
            self._superseded_by = self._replaceable_end(message)
            if self._superseded_by is not None:
                return None
        news = self._continuity.join(message)
        if news is not None:
            self._attempts, self.last_loss = 0, None
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
        self.heard = False
        if isinstance(error, DeadlineExceeded):
            self.unsettled = self.generation_id is not None or not error.reason
            return error if self.last_loss is None else _too_late(self.last_loss)
        superseded_by, self._superseded_by = self._superseded_by, None
        if superseded_by is not None:
            self._generate_again()
            error = superseded_by
        elif isinstance(error, NotFound) and isinstance(self.request, v1.WatchRequest) and self._generate_again():
            return 0.0
        elif self._policy.is_balanced and error.reason == _OTHER_REPLICA and not self._has_searched:
            self._has_searched = True
            return 0.0
        if not self._is_worth_retrying(error) or self._attempts >= self._policy.retries:
            self.unsettled = self.generation_id is not None and not isinstance(error, NotFound)
            return error
        if self.time_left == 0:
            return _too_late(error)
        self._attempts, self.last_loss = self._attempts + 1, error
        if self.generation_id is not None:
            self.request = self._watch_request(self.generation_id)
        return self._wait(error)

    def _wait(self, error: CalotypeError) -> float:
        wait = self._policy.wait(self._attempts)
        # With several servers, another one can serve the request sooner than the server that asked for a delay.
        if not (self._policy.is_balanced and isinstance(error, Unavailable)):
            wait += error.retry_after or 0.0
        return wait if self.time_left is None else min(wait, self.time_left)

    def _watch_request(self, generation_id: str) -> v1.WatchRequest:
        preview = self._original.preview if isinstance(self._original, v1.WatchRequest) else None
        after = self._continuity.sequence
        return v1.WatchRequest(generation_id=generation_id, after_sequence=after, preview=preview)

    def _replaceable_end(self, message: v1.Progress) -> CalotypeError | None:
        """Returns the error of an end that the server caused, not the request, so that a new generation may follow."""
        if isinstance(self._original, v1.WatchRequest) or self._attempts >= self._policy.retries:
            return None
        error = from_error_message(message.error, Cancelled) if message.HasField("error") else None
        is_replaceable = isinstance(error, Unavailable) or (error is not None and error.reason == _ABANDONED)
        return error if is_replaceable else None

    def _generate_again(self) -> bool:
        """Makes the next request the original one with the seed in use. Returns False for a watched generation."""
        if isinstance(self._original, v1.WatchRequest):
            return False
        self.request = v1.GenerateRequest()
        self.request.CopyFrom(self._original)
        self.request.seed = self._seed
        self.generation_id = None
        return True

    def _is_worth_retrying(self, error: CalotypeError) -> bool:
        if not self._policy.retries:
            return False
        if self._reached:
            is_lost = isinstance(error, (Unavailable, StreamIncomplete)) or error.reason == _ABANDONED
            return is_lost or error.retry_after is not None
        # Only a server sets a reason: this one rejects the request. Another may accept it.
        if self._policy.is_balanced and isinstance(error, Unavailable) and error.reason:
            return True
        unheard = error.reason or any(text in error.message for text in _UNREACHED)
        self._reached = isinstance(error, Unavailable) and not unheard
        return self._reached


def _too_late(reason: CalotypeError) -> DeadlineExceeded:
    return DeadlineExceeded(f"The timeout passed while reconnecting: {reason}")
