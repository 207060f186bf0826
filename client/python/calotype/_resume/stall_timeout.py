"""Notices servers that fall silent. They promise a message every 10 s, also while a generation waits in the queue.

A connection may look well long after the server has stopped working: frozen, or gone behind a proxy that is not. gRPC's
pings tell of the next hop only, and of its network stack rather than of the program.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import grpc

from .._errors import Unavailable

if TYPE_CHECKING:
    from .._generation import SyncCall
    from ..v1 import calotype_pb2 as v1

__all__ = ["STALL_TIMEOUT", "Watchdog", "silence"]

STALL_TIMEOUT = 20.0
"""Seconds without a message after which a server counts as lost: twice what it promises."""

_INTERVAL_SECONDS = 0.25
"""Between two looks at what is awaited."""

_IDLE_SECONDS = 10.0
"""After which the thread ends that has nothing to watch."""


def silence(seconds: float) -> Unavailable:
    """Makes the error for a server that has fallen silent."""
    return Unavailable(f"The server has sent nothing for {seconds:g} s.")


class Watchdog:
    """Cancels calls whose next message does not come, which gRPC's iterators wait for without limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._awaited: dict[SyncCall, float] = {}
        self._is_watching = False

    def next(self, call: SyncCall, seconds: float | None) -> v1.Progress:
        """Returns the next message of a call, and waits so long for it. None means without limit.

        Raises:
            Unavailable: It did not come in time; the call is cancelled.
            StopIteration: There is none.
            grpc.RpcError: The call failed.
        """
        if seconds is None:
            return next(call)
        with self._lock:
            self._awaited[call] = time.monotonic() + seconds
            if not self._is_watching:
                self._is_watching = True
                threading.Thread(target=self._watch, name="calotype-watchdog", daemon=True).start()
        message = None
        try:
            message = next(call)
        except grpc.RpcError:
            if call in self._awaited:
                raise
        finally:
            with self._lock:
                in_time = self._awaited.pop(call, None) is not None
        if message is None or not in_time:
            raise silence(seconds) from None
        return message

    def _watch(self) -> None:
        idle_until = time.monotonic() + _IDLE_SECONDS
        while True:
            now = time.monotonic()
            with self._lock:
                late = [call for call, until in self._awaited.items() if until <= now]
                for call in late:
                    del self._awaited[call]
                if self._awaited:
                    idle_until = now + _IDLE_SECONDS
                elif now >= idle_until:
                    self._is_watching = False
                    return
            for call in late:
                call.cancel()
            time.sleep(_INTERVAL_SECONDS)
