"""Cancels generations on the server in the background, as tasks. `threads.pending_cancels` does so without asyncio.

When a call ends, the server cannot tell a lost connection from a caller that left, so it keeps the generation for its
disconnect grace. A caller that leaves therefore also sends `Cancel` by id. Leaving happens in `finally` blocks and in
the garbage collector, so it never waits for the answer; closing the client waits up to 1 s for pending cancels. If a
cancel does not arrive, the generation ends after its grace.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import grpc

from ..._constants import CONTROL_TIMEOUT_SECONDS
from ..._resume.policy import NEWEST_GENERATIONS
from ...v1 import calotype_pb2 as v1

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

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
        self._tasks: set[asyncio.Task[None]] = set()

    def send(
        self,
        stub: Stub,
        resumption: Resumption,
        ask: Callable[[], AsyncIterator[tuple[str, Stub]]] | None = None,
    ) -> None:
        """Cancels a generation without waiting.

        Args:
            stub: The server to ask, when there is only one.
            resumption: The generation to cancel. Without a generation id, it is found by its request id.
            ask: Yields all servers, when there are several: each of them is asked.
        """
        self._start(self._cancel(stub, resumption) if ask is None else self._cancel_on_all(ask, resumption))

    def send_group(
        self, stub: Stub, group: str, ask: Callable[[], AsyncIterator[tuple[str, Stub]]] | None = None
    ) -> None:
        """Cancels a group without waiting; `stub` and `ask` as for `send`."""
        self._start(self._cancel_group(stub, group) if ask is None else self._cancel_group_on_all(ask, group))

    async def wait(self) -> None:
        """Waits up to 1 s for the cancels in progress."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_SECONDS)

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel_on_all(self, ask: Callable[[], AsyncIterator[tuple[str, Stub]]], resumption: Resumption) -> None:
        async for _, stub in ask():
            self.send(stub, resumption)

    async def _cancel_group_on_all(self, ask: Callable[[], AsyncIterator[tuple[str, Stub]]], group: str) -> None:
        async for _, stub in ask():
            self.send_group(stub, group)

    async def _cancel_group(self, stub: Stub, group: str) -> None:
        with contextlib.suppress(grpc.RpcError):
            request = v1.CancelRequest(group=group)
            await stub.Cancel(request, timeout=CONTROL_TIMEOUT_SECONDS, metadata=self._metadata)

    async def _cancel(self, stub: Stub, resumption: Resumption) -> None:
        with contextlib.suppress(grpc.RpcError):
            if (generation_id := resumption.generation_id) is None:
                answer = await stub.ListGenerations(
                    NEWEST_GENERATIONS, timeout=CONTROL_TIMEOUT_SECONDS, metadata=self._metadata
                )
                generation_id = resumption.find_id(answer)
            if generation_id is not None:
                request = v1.CancelRequest(generation_id=generation_id)
                await stub.Cancel(request, timeout=CONTROL_TIMEOUT_SECONDS, metadata=self._metadata)
