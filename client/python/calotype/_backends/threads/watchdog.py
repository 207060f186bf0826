"""Detects stalled servers. A server sends a message at least every 10 s, also while a generation is queued.

A connection can look healthy long after the server stopped working: the server is frozen, or a proxy in front of it
still answers. gRPC's pings reach only the next hop, and only its network stack.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import grpc

from ..._status import stalled

if TYPE_CHECKING:
    from ...v1 import calotype_pb2 as v1
    from .primitives import Call

__all__ = ["Watchdog"]

_INTERVAL_SECONDS = 0.25
"""Time between two checks of the waiting calls."""

_IDLE_SECONDS = 10.0
"""The watchdog thread exits after this many idle seconds."""


class Watchdog:
    """Cancels a call when its next message is late. gRPC's own iterators wait without limit.

    One thread serves all calls of a client. It starts with the first wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[Call, float] = {}
        self._is_running = False

    def next(self, call: Call, seconds: float) -> v1.Progress:
        """Returns the next message of a call, and waits up to `seconds` for it.

        Raises:
            Unavailable: The message did not arrive in time. The call is cancelled.
            StopIteration: The call has no more messages.
            grpc.RpcError: The call failed.
        """
        with self._lock:
            self._deadlines[call] = time.monotonic() + seconds
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="calotype-watchdog", daemon=True).start()
        message = None
        try:
            message = next(call)
        except grpc.RpcError:
            if call in self._deadlines:
                raise
        finally:
            with self._lock:
                in_time = self._deadlines.pop(call, None) is not None
        if message is None or not in_time:
            raise stalled(seconds) from None
        return message

    def _run(self) -> None:
        idle_until = time.monotonic() + _IDLE_SECONDS
        while True:
            now = time.monotonic()
            with self._lock:
                late = [call for call, deadline in self._deadlines.items() if deadline <= now]
                for call in late:
                    del self._deadlines[call]
                if self._deadlines:
                    idle_until = now + _IDLE_SECONDS
                elif now >= idle_until:
                    self._is_running = False
                    return
            for call in late:
                call.cancel()
            time.sleep(_INTERVAL_SECONDS)
