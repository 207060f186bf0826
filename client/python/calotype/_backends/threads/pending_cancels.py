"""Cancels generations on the server in the background, as gRPC futures. See `aio.pending_cancels` for the reasons."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import grpc

from ..._constants import CONTROL_TIMEOUT_SECONDS
from ..._resume.policy import NEWEST_GENERATIONS
from ...v1 import calotype_pb2 as v1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..._channel import Metadata
    from ..._resume.policy import Resumption
    from .primitives import Stub

__all__ = ["PendingCancels"]

_CLOSE_TIMEOUT_SECONDS = 1.0


class PendingCancels:
    """The cancels in progress of one client.

    Args:
        metadata: Metadata of every call.
    """

    def __init__(self, metadata: Metadata = ()) -> None:
        self._metadata = metadata
        self._changed = threading.Condition()
        self._pending: set[Any] = set()

    def send(
        self,
        stub: Stub,
        resumption: Resumption,
        ask: Callable[[], Iterator[tuple[str, Stub]]] | None = None,
    ) -> None:
        """Cancels a generation without waiting.

        Args:
            stub: The server to ask, when there is only one.
            resumption: The generation to cancel. Without a generation id, it is found by its request id.
            ask: Yields all servers, when there are several: each of them is asked.
        """
        if ask is not None:
            self._send_to_all(ask, lambda stub: self.send(stub, resumption))
            return
        with contextlib.suppress(ValueError):  # the client closed its channel meanwhile
            if resumption.generation_id is not None:
                self._cancel(stub, v1.CancelRequest(generation_id=resumption.generation_id))
            else:
                self._find_and_cancel(stub, resumption)

    def send_group(self, stub: Stub, group: str, ask: Callable[[], Iterator[tuple[str, Stub]]] | None = None) -> None:
        """Cancels a group without waiting; `stub` and `ask` as for `send`."""
        if ask is not None:
            self._send_to_all(ask, lambda stub: self.send_group(stub, group))
            return
        with contextlib.suppress(ValueError):  # the client closed its channel meanwhile
            self._cancel(stub, v1.CancelRequest(group=group))

    def wait(self) -> None:
        """Waits up to 1 s for the cancels in progress."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending, _CLOSE_TIMEOUT_SECONDS)

    def _send_to_all(self, ask: Callable[[], Iterator[tuple[str, Stub]]], send: Callable[[Stub], None]) -> None:
        """Calls `send` for all servers, in a thread."""

        def run() -> None:
            with contextlib.suppress(ValueError):  # the client closed its channels meanwhile
                for _, stub in ask():
                    send(stub)
            self._remove(send)

        self._add(send)
        threading.Thread(target=run, daemon=True).start()

    def _find_and_cancel(self, stub: Stub, resumption: Resumption) -> None:
        def found(call: Any) -> None:
            if call.code() is not grpc.StatusCode.OK:
                return
            generation_id = resumption.find_id(call.result())
            if generation_id is not None:
                with contextlib.suppress(ValueError):  # the client closed its channel meanwhile
                    self._cancel(stub, v1.CancelRequest(generation_id=generation_id))

        call = stub.ListGenerations.future(NEWEST_GENERATIONS, timeout=CONTROL_TIMEOUT_SECONDS, metadata=self._metadata)
        self._track(call, found)

    def _cancel(self, stub: Stub, request: v1.CancelRequest) -> None:
        self._track(stub.Cancel.future(request, timeout=CONTROL_TIMEOUT_SECONDS, metadata=self._metadata))

    def _track(self, call: Any, then: Callable[[Any], None] | None = None) -> None:
        self._add(call)

        def ended(_: Any) -> None:
            if then is not None:
                then(call)
            self._remove(call)

        call.add_done_callback(ended)

    def _add(self, work: Any) -> None:
        with self._changed:
            self._pending.add(work)

    def _remove(self, work: Any) -> None:
        with self._changed:
            self._pending.discard(work)
            self._changed.notify_all()
