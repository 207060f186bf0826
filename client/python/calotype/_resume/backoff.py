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
        retries: Attempts in a row without progress. 0 disables reconnecting.
        base: Longest wait before the first attempt, in seconds. It doubles with each attempt.
        cap: Longest wait before any attempt, in seconds.
        random: Returns a random number, 0 to 1.
        clock: Returns monotonic time in seconds.
        is_balanced: Whether the target can stand for several servers, so that another server may serve the request.
    """

    retries: int = RETRIES
    base: float = RETRY_BASE_SECONDS
    cap: float = RETRY_MAX_SECONDS
    random: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    is_balanced: bool = False

    def wait(self, attempt: int) -> float:
        """Returns the seconds to wait before an attempt: random() * min(cap, base * 2^(attempt - 1)).

        Args:
            attempt: Number of the attempt, from 1.
        """
        return self.random() * min(self.cap, self.base * 2.0 ** min(attempt - 1, 60))
