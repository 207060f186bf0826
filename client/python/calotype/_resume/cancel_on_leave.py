"""Tells the server that a caller has left a generation for good, so that its slot is free at once.

A lost link and a caller who leaves look the same to the server: the call ends. Where a generation may outlive that,
leaving means `Cancel` by id. Nobody waits for the answer: leaving happens in `finally` and in the garbage collector,
and must not hang on a dead link. Closing the client waits a moment for those under way. What does not arrive, the grace
of the generation makes good.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import grpc

from .._request import CONTROL_TIMEOUT
from ..v1 import calotype_pb2 as v1

if TYPE_CHECKING:
    from .._replicas import AsyncReplicas, Replicas
    from ..v1.calotype_pb2_grpc import GenerationServiceAsyncStub, GenerationServiceStub
    from .policy import Resumption

    Metadata = tuple[tuple[str, str], ...]

__all__ = ["AsyncFarewells", "PendingCancels"]

_PATIENCE = 1.0  # seconds, of a client that is being closed


def _id_of(resumption: Resumption, answer: v1.ListGenerationsResponse) -> str | None:
    """Finds a generation whose first message has not arrived; it is among the newest."""
    request_id = getattr(resumption.request, "request_id", "")
    found = (summary.generation_id for summary in answer.generations if summary.request_id == request_id)
    return next(found, None) if request_id else None


_NEWEST = v1.ListGenerationsRequest(page_size=100)


class PendingCancels:
    """The cancellations under way of a `Client`, whose calls carry `metadata`."""

    def __init__(self, metadata: Metadata = ()) -> None:
        self._metadata = metadata
        self._changed = threading.Condition()
        self._calls: set[Any] = set()

    def send(self, stub: GenerationServiceStub, resumption: Resumption, replicas: Replicas | None = None) -> None:
        """Cancels a generation, without waiting. Of several servers, all are told: one of them has it."""
        if replicas is not None:
            with self._changed:
                self._calls.add(resumption)
            threading.Thread(target=self._send_to_all, args=(replicas, resumption), daemon=True).start()
            return
        if resumption.generation_id is not None:
            self._cancel(stub, resumption.generation_id)
            return

        def found(call: Any) -> None:
            if call.code() is grpc.StatusCode.OK and (generation_id := _id_of(resumption, call.result())) is not None:
                with contextlib.suppress(ValueError):  # the channel has been closed meanwhile
                    self._cancel(stub, generation_id)

        self._keep(stub.ListGenerations.future(_NEWEST, timeout=CONTROL_TIMEOUT, metadata=self._metadata), found)

    def wait(self) -> None:
        """Waits a moment for those under way."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls, _PATIENCE)

    def _send_to_all(self, replicas: Replicas, resumption: Resumption) -> None:
        with contextlib.suppress(ValueError):  # the channels have been closed meanwhile
            for _, stub in replicas.ask():
                self.send(stub, resumption)
        with self._changed:
            self._calls.discard(resumption)
            self._changed.notify_all()

    def _cancel(self, stub: GenerationServiceStub, generation_id: str) -> None:
        request = v1.CancelRequest(generation_id=generation_id)
        self._keep(stub.Cancel.future(request, timeout=CONTROL_TIMEOUT, metadata=self._metadata))

    def _keep(self, call: Any, then: Any = None) -> None:
        with self._changed:
            self._calls.add(call)

        def ended(_: Any) -> None:
            if then is not None:
                then(call)
            with self._changed:
                self._calls.discard(call)
                self._changed.notify_all()

        call.add_done_callback(ended)


class AsyncFarewells:
    """The cancellations under way of an `AsyncClient`, whose calls carry `metadata`."""

    def __init__(self, metadata: Metadata = ()) -> None:
        self._metadata = metadata
        self._tasks: set[asyncio.Task[None]] = set()

    def send(
        self, stub: GenerationServiceAsyncStub, resumption: Resumption, replicas: AsyncReplicas | None = None
    ) -> None:
        """Cancels a generation, without waiting. Of several servers, all are told: one of them has it."""
        work = self._cancel(stub, resumption) if replicas is None else self._cancel_on_all(replicas, resumption)
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Waits a moment for those under way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_PATIENCE)

    async def _cancel_on_all(self, replicas: AsyncReplicas, resumption: Resumption) -> None:
        async for _, stub in replicas.ask():
            self.send(stub, resumption)

    async def _cancel(self, stub: GenerationServiceAsyncStub, resumption: Resumption) -> None:
        with contextlib.suppress(grpc.RpcError):
            generation_id = resumption.generation_id
            if generation_id is None:
                generation_id = _id_of(
                    resumption, await stub.ListGenerations(_NEWEST, timeout=CONTROL_TIMEOUT, metadata=self._metadata)
                )
            if generation_id is not None:
                await stub.Cancel(
                    v1.CancelRequest(generation_id=generation_id), timeout=CONTROL_TIMEOUT, metadata=self._metadata
                )
