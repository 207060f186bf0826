"""Decides whether to call again after a failed call, and how long to wait first. Does no I/O and never waits.

Each failure is one of these:

- *Loading*: the server answers that it is not ready, because it loads its model or shuts down. It exists and will be
  ready, or will be replaced, so the answer is not a failed attempt: it starts the count of failed attempts again. Only
  the caller's timeout ends the wait; without a timeout, `LOADING_TIMEOUT_SECONDS` does.
- *Unreached*: no server received the call. Before the first contact, the caller gets this error immediately, unless it
  asked to wait for a server.
- *Lost*: the server may have received the call. Like an unreached server after the first contact, it counts as a failed
  attempt.
- Everything else is final.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .._constants import LOADING_TIMEOUT_SECONDS, RETRY_BASE_SECONDS
from .._errors import CalotypeError, DataLoss, DeadlineExceeded, StreamIncomplete, Unavailable

if TYPE_CHECKING:
    from .backoff import RetryPolicy

__all__ = ["ABANDONED", "Waits", "is_loading", "is_unreached", "too_late"]

ABANDONED = "ABANDONED"

_LOADING = ("NOT_READY", "DRAINING")
_UPSTREAM_UNAVAILABLE = "UPSTREAM_UNAVAILABLE"

_ENGINE_CRASHED = "ENGINE_CRASHED"

# gRPC's messages for a call that reached no server. After any other failure, a server may have received the request.
_UNREACHED = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "errors resolving",
    "DNS resolution failed",
)


def is_loading(error: CalotypeError) -> bool:
    """Returns whether a server answered that it is not ready: it loads its model, or it shuts down."""
    return isinstance(error, Unavailable) and error.reason in _LOADING


def is_unreached(error: CalotypeError) -> bool:
    """Returns whether the call reached no server, or a bridge without a server behind it."""
    if not isinstance(error, Unavailable):
        return False
    return error.reason == _UPSTREAM_UNAVAILABLE or (
        not error.reason and any(text in error.message for text in _UNREACHED)
    )


def too_late(reason: CalotypeError) -> DeadlineExceeded:
    """Makes the error of a call whose timeout passed during a wait."""
    doing = "waiting for the server" if is_loading(reason) else "reconnecting"
    return DeadlineExceeded(f"The timeout passed while {doing}: {reason}")


class Waits:
    """Counts the failures of one call or generation since the last news.

    Args:
        policy: The limits.
        timeout: Seconds until the caller's deadline. None without a deadline.

    Attributes:
        reached: Whether a server answered, or may have received a call.
    """

    def __init__(self, policy: RetryPolicy, timeout: float | None = None) -> None:
        self.reached = False
        self._policy = policy
        self._deadline = None if timeout is None else policy.clock() + timeout
        self._failures = 0
        self._loading_answers = 0
        self._loading_since = math.inf
        self._unreached_calls = 0
        self._unreached_since = math.inf

    @property
    def time_left(self) -> float | None:
        """Seconds until the deadline, at least 0. None without a deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - self._policy.clock())

    @property
    def exhausted(self) -> bool:
        """Whether one more failed attempt is one too many."""
        return self._failures >= self._policy.retries

    def hear(self) -> None:
        """Records that a server has received the call."""
        self.reached = True

    def reset(self) -> None:
        """Records news for the caller: all counts and limits start again."""
        self._failures = self._loading_answers = 0
        self._loading_since = math.inf

    def after(self, error: CalotypeError) -> float | CalotypeError:
        """Takes the error of a call.

        Returns:
            Seconds to wait before the next call, or the error to raise.
        """
        policy, now = self._policy, self._policy.clock()
        if not policy.retries:
            return error
        if is_loading(error):
            self.reached = True
            self._failures = 0
            self._loading_answers += 1
            self._loading_since = min(self._loading_since, now)
            end = self._loading_since + self._loading_limit
            if now >= end:
                return _not_ready(error, self._loading_limit)
            return self._wait(self._loading_answers, error, end - now)
        if not self.reached and is_unreached(error):
            self._unreached_since = min(self._unreached_since, now)
            end = self._unreached_since + policy.wait_for_server
            if now >= end:
                return error
            self._unreached_calls += 1
            return self._wait(self._unreached_calls, error, end - now)
        if not self._may_help(error) or self.exhausted:
            return error
        self._failures += 1
        return self._wait(self._failures, error)

    @property
    def _loading_limit(self) -> float:
        if self._policy.loading_timeout is not None:
            return self._policy.loading_timeout
        return LOADING_TIMEOUT_SECONDS if self._deadline is None else math.inf

    def _may_help(self, error: CalotypeError) -> bool:
        # The same request id would get the same end again.
        if error.reason == _ENGINE_CRASHED or isinstance(error, DataLoss):
            return False
        if self.reached:
            is_lost = isinstance(error, (Unavailable, StreamIncomplete)) or error.reason == ABANDONED
            return is_lost or error.retry_after is not None
        if not isinstance(error, Unavailable):
            return False
        # Only a server sets a reason: this one rejects the request. Another may accept it.
        if error.reason:
            return self._policy.is_balanced
        self.reached = True
        return True

    def _wait(self, attempt: int, error: CalotypeError, most: float = math.inf) -> float | CalotypeError:
        left = math.inf if self.time_left is None else self.time_left
        if left == 0:
            return too_late(error)
        wait = self._policy.wait(attempt)
        # With several servers, another one can serve the request sooner than the server that asked for a delay.
        if not (self._policy.is_balanced and isinstance(error, Unavailable)):
            wait += error.retry_after or 0.0
        # The server's delay is an estimate: at least one more attempt comes before the deadline.
        return min(wait, most, max(left / 2, min(left, RETRY_BASE_SECONDS)))


def _not_ready(error: CalotypeError, seconds: float) -> CalotypeError:
    if not seconds:
        return error
    text = f"The server was not ready within {seconds:g} s: {error}"
    return Unavailable(text, reason=error.reason, retry_after=error.retry_after, metadata=error.metadata)
