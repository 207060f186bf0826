"""Limits the number of simultaneous calls of each host, over all ports."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from calotype_server.errors import TooManyCalls
from calotype_server.transport.net.peers import share_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CallLimiter"]

_RETRY_SECONDS = 1.0


class CallLimiter:
    """Counts calls by the host they come from, and rejects calls above the limit. Not thread-safe.

    Args:
        max_calls: Largest number of simultaneous calls from one host.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def admit(self, peer: str) -> Iterator[None]:
        """Counts a call while the block runs.

        Args:
            peer: The canonical peer; hosts in one IPv6 /64 count as one.

        Raises:
            TooManyCalls: The host has reached its limit.
        """
        host = share_of(peer)
        if self._calls[host] >= self._max_calls:
            raise TooManyCalls(
                f"Your host already has {self._max_calls} active calls.",
                retry_after=_RETRY_SECONDS,
                metadata={"max_calls_per_peer": str(self._max_calls)},
            )
        self._calls[host] += 1
        try:
            yield
        finally:
            self._calls[host] -= 1
            if not self._calls[host]:
                del self._calls[host]
