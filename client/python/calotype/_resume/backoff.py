"""Number and timing of reconnection attempts."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._constants import RETRIES, RETRY_BASE_SECONDS, RETRY_MAX_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with full jitter.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter

    Attributes:
        retries: Failed attempts in a row. 0 disables all waits.
        base: Longest wait before the first attempt, in seconds. It doubles with each attempt.
        cap: Longest wait before any attempt, in seconds.
        random: Returns a random number, 0 to 1.
        clock: Returns monotonic time in seconds.
        wait_for_server: Seconds to wait before the first contact for a server that cannot be reached.
        loading_timeout: Seconds to wait for a server that is not ready. None means until the caller's deadline, or
            `LOADING_TIMEOUT_SECONDS` without a deadline.
        is_balanced: Whether the target can stand for several servers, so that another server may serve the request.
    """

    retries: int = RETRIES
    base: float = RETRY_BASE_SECONDS
    cap: float = RETRY_MAX_SECONDS
    random: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    wait_for_server: float = 0.0
    loading_timeout: float | None = None
    is_balanced: bool = False

    def wait(self, attempt: int) -> float:
        """Returns the seconds to wait before an attempt: random() * min(cap, base * 2^(attempt - 1)).

        Args:
            attempt: Number of the attempt, from 1.
        """
        return self.random() * min(self.cap, self.base * 2.0 ** min(attempt - 1, 60))
