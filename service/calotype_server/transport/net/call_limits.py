"""How many calls each peer has under way, on all ports together."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from calotype_server.errors import TooManyCalls

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CallLimiter"]

_RETRY_SECONDS = 1.0


class CallLimiter:
    """Counts calls by the host that they come from, and refuses one too many. Lives in the event loop.

    Args:
        most: Calls of one host at the same time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def admit(self, peer: str) -> Iterator[None]:
        """Counts a call while the block runs.

        Args:
            peer: As gRPC writes addresses, such as ipv4:127.0.0.1:4711.

        Raises:
            TooManyCalls: The host has as many as it may.
        """
        host = peer.rpartition(":")[0]
        if self._calls[host] >= self._most:
            raise TooManyCalls(
                f"You have {self._most} calls under way already.",
                retry_after=_RETRY_SECONDS,
                metadata={"max_calls_per_peer": str(self._most)},
            )
        self._calls[host] += 1
        try:
            yield
        finally:
            self._calls[host] -= 1
            if not self._calls[host]:
                del self._calls[host]
