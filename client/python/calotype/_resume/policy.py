"""Decides how a generation outlives its connection. No I/O and no waiting: both kinds of generation are driven by this.

A stream that breaks is not the end of a generation. The server keeps what it does for a while, so the client calls
`Watch` with the last sequence number; a server that has lost it, such as one that was started anew, is asked to
generate again with the seed that was drawn. What a message then tells is joined to what was shown before, see `_seam`.

- Waits grow exponentially with full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter.
- There is something to come back to because the generation may run without a reader for `DISCONNECT_GRACE` seconds.
  Closing the call therefore no longer says that the caller has left: `_farewell` does.
- The first message may be lost as well. Every request has a `request_id`, so that asking again never starts a second.
- A server that stops, or that has waited in vain for a reader, ends a generation for reasons that are not the caller's:
  that end is not shown either, and the same picture is asked for again.
- At first contact nothing can be lost yet: a server that cannot be reached, or that refuses, is told to the caller at
  once. Later, both are retried, no sooner than the server says.
- Where there are several servers, one that cannot is replaced by another, at first contact as well: whoever asks for a
  generation that a server has lost, or has taken with it, asks any of them to make it again.
"""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from .._errors import CalotypeError, Cancelled, DeadlineExceeded, NotFound, StreamIncomplete, Unavailable
from .._status import from_error_message
from ..v1 import calotype_pb2 as v1
from .continuity import ENDS, Continuity

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DISCONNECT_GRACE", "RETRIES", "Resumption", "RetryPolicy", "make_resumable"]

DISCONNECT_GRACE = 10
"""Seconds that a generation may run without a reader, where the caller did not choose."""

RETRIES = 10
"""Attempts in a row, of which most wait for seconds: about half a minute, enough for a server to start again."""

_ABANDONED, _OTHER_REPLICA = "ABANDONED", "OTHER_REPLICA"

# What the core of gRPC says when a call has reached nobody; anything else may have been heard.
_UNREACHED = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "errors resolving",
    "DNS resolution failed",
)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and when to reconnect.

    Attributes:
        retries: Attempts in a row that bring nothing new. 0 means never to reconnect.
        base: Longest wait before the first of them, in seconds. It doubles with each.
        cap: Longest wait at all, in seconds.
        random: Gives numbers from 0 to 1.
        clock: Gives seconds from any start.
        is_balanced: Whether there may be several servers, so that another may do what one cannot.
        notify: Told of each loss, and of the seconds until the next attempt. None tells nobody.
    """

    retries: int = RETRIES
    base: float = 0.25
    cap: float = 8.0
    random: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    is_balanced: bool = False
    notify: Callable[[CalotypeError, float], None] | None = None

    def wait(self, attempt: int) -> float:
        """Returns how long to wait before an attempt, counted from 1, in seconds."""
        return self.random() * min(self.cap, self.base * 2.0 ** min(attempt - 1, 60))


def make_resumable(request: v1.GenerateRequest) -> None:
    """Fills in what resuming needs and the caller did not choose: a request id, and a grace under CANCEL."""
    request.request_id = request.request_id or uuid.uuid4().hex
    if request.on_disconnect != v1.DISCONNECT_POLICY_KEEP and not request.HasField("disconnect_grace"):
        request.disconnect_grace.CopyFrom(Duration(seconds=DISCONNECT_GRACE))


class Resumption:
    """What one generation asks of the server next, and what of the answers is news to the caller.

    Usage: make the call for `request` within `time_left`, pass each message through `take`, and when the call breaks,
    ask `lost` how long to wait before the next one.

    Attributes:
        request: What to send now.
        generation_id: Of the generation on the server. None before the first message.
        unsettled: Whether the server may have a generation that has not ended.
        heard: Whether the call has brought a message.
        last_loss: Why the last call brought no end. None when there is news since.
    """

    def __init__(
        self, request: v1.GenerateRequest | v1.WatchRequest, policy: RetryPolicy, timeout: float | None = None
    ) -> None:
        self.request = request
        self.generation_id: str | None = None
        self.unsettled = True
        self.heard = False
        self._origin = request
        self._policy = policy
        self._deadline = None if timeout is None else policy.clock() + timeout
        self._seed = 0  # in use, once a message has come
        self._attempts = 0
        self._searched = False  # whether all servers were asked for what is to be watched
        self._reached = False  # whether a call may have reached a server
        self.last_loss: CalotypeError | None = None
        self._void: CalotypeError | None = None  # why the generation ended that another one has to replace
        if isinstance(request, v1.WatchRequest):
            self.generation_id = request.generation_id
            self._seam = Continuity(request.generation_id, request.after_sequence)
        else:
            self._seam = Continuity()

    @property
    def time_left(self) -> float | None:
        """Seconds until the deadline, not below 0. None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - self._policy.clock())

    @property
    def leaving_cancels(self) -> bool:
        """Whether the generation is to end when the caller leaves it: started here, and not to be kept."""
        return isinstance(self._origin, v1.GenerateRequest) and self._origin.on_disconnect != v1.DISCONNECT_POLICY_KEEP

    @property
    def lingers(self) -> bool:
        """Whether the server goes on, at least for a while, when the call is closed."""
        if not self.leaving_cancels or not isinstance(self._origin, v1.GenerateRequest):
            return True
        grace = self._origin.disconnect_grace
        return bool(grace.seconds or grace.nanos)

    def take(self, message: v1.Progress) -> v1.Progress | None:
        """Takes a message of the call.

        Returns:
            What of it is news to the caller, or None.
        """
        self._reached = self.heard = True
        self.generation_id, self._seed = message.generation_id, message.seed
        if message.phase in ENDS:
            self.settle()
            self._void = self._why_void(message)
            if self._void is not None:
                return None
        news = self._seam.join(message)
        if news is not None:
            self._attempts, self.last_loss = 0, None
        return news

    def settle(self) -> None:
        """Notes that the server has nothing left to end."""
        self.unsettled = False

    def lost(self, error: CalotypeError) -> float | CalotypeError:
        """Takes the way in which the call ended, when no message has told how the generation did.

        Returns:
            Seconds to wait before `request` is sent, or what to tell the caller: it is over.
        """
        self._seam.cut()
        self.heard = False
        if isinstance(error, DeadlineExceeded):
            self.unsettled = self.generation_id is not None or not error.reason
            return error if self.last_loss is None else _too_late(self.last_loss)
        void, self._void = self._void, None
        if void is not None:
            self._begin_anew()
            error = void
        elif isinstance(error, NotFound) and isinstance(self.request, v1.WatchRequest) and self._begin_anew():
            return 0.0
        elif self._policy.is_balanced and error.reason == _OTHER_REPLICA and not self._searched:
            self._searched = True
            return 0.0
        if not self._worth_retrying(error) or self._attempts >= self._policy.retries:
            self.unsettled = self.generation_id is not None and not isinstance(error, NotFound)
            return error
        if self.time_left == 0:
            return _too_late(error)
        self._attempts, self.last_loss = self._attempts + 1, error
        if self.generation_id is not None:
            preview = self._origin.preview if isinstance(self._origin, v1.WatchRequest) else None
            self.request = v1.WatchRequest(
                generation_id=self.generation_id, after_sequence=self._seam.sequence, preview=preview
            )
        wait = self._policy.wait(self._attempts)
        if not (self._policy.is_balanced and isinstance(error, Unavailable)):  # another server does not keep us waiting
            wait += error.retry_after or 0.0
        return wait if self.time_left is None else min(wait, self.time_left)

    def _why_void(self, message: v1.Progress) -> CalotypeError | None:
        """Returns the error of an end that says nothing of the picture, where another one may be begun."""
        if isinstance(self._origin, v1.WatchRequest) or self._attempts >= self._policy.retries:
            return None
        error = from_error_message(message.error, Cancelled) if message.HasField("error") else None
        void = isinstance(error, Unavailable) or (error is not None and error.reason == _ABANDONED)
        return error if void else None

    def _begin_anew(self) -> bool:
        """Asks for the same picture again, where it was asked for here. Says whether it was."""
        if isinstance(self._origin, v1.WatchRequest):
            return False
        self.request = v1.GenerateRequest()
        self.request.CopyFrom(self._origin)
        self.request.seed = self._seed
        self.generation_id = None
        return True

    def _worth_retrying(self, error: CalotypeError) -> bool:
        if not self._policy.retries:
            return False
        if self._reached:
            lost = isinstance(error, (Unavailable, StreamIncomplete)) or error.reason == _ABANDONED
            return lost or error.retry_after is not None
        # Only a server gives a reason: an answer that refuses. Another may not.
        if self._policy.is_balanced and isinstance(error, Unavailable) and error.reason:
            return True
        unheard = error.reason or any(text in error.message for text in _UNREACHED)
        self._reached = isinstance(error, Unavailable) and not unheard
        return self._reached


def _too_late(reason: CalotypeError) -> DeadlineExceeded:
    return DeadlineExceeded(f"The timeout passed while reconnecting: {reason}")
