"""A generation: iterate over its progress, wait for its result, finish or cancel it.

`Generation` and `AsyncGeneration` differ only in `await`. What to do when the connection is lost, `_resume` decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import grpc
import grpc.aio

from ._assembler import Assembler, incomplete
from ._errors import CalotypeError, Cancelled, ClientClosed, GenerationConsumed, Unavailable
from ._resume.stall_timeout import silence
from ._status import from_rpc_error, from_status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import TracebackType

    from ._async_client import AsyncClient
    from ._client import Client
    from ._image import Image
    from ._resume.policy import Resumption
    from ._types import Notice, Phase, Progress
    from .v1 import calotype_pb2 as v1

    SyncCall: TypeAlias = grpc._CallIterator[v1.Progress]
    AsyncCall: TypeAlias = grpc.aio.UnaryStreamCall[Any, v1.Progress]

__all__ = ["AsyncGeneration", "Generation"]


class _BaseGeneration:
    """What needs no I/O."""

    _client: Client | AsyncClient
    _call: SyncCall | AsyncCall
    _left: threading.Event | asyncio.Event

    def __init__(self, resumption: Resumption) -> None:
        self._resumption = resumption
        self._assembler = Assembler()
        self._iterated = False

    @property
    def progress(self) -> Progress | None:
        """The newest progress, or None before the first message."""
        return self._assembler.progress

    @property
    def id(self) -> str | None:
        """Identifies the generation, see `Client.cancel`. None before the first message."""
        return self.progress.generation_id if self.progress else None

    @property
    def seed(self) -> int | None:
        """Seed in use: the one asked for, or the one drawn. None before the first message."""
        return self.progress.seed if self.progress else None

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """Every warning so far, each once, such as that the prompt was cut."""
        return self._assembler.warnings

    @property
    def done(self) -> bool:
        """Whether the generation has ended, in whatever way."""
        return self._assembler.ended

    def cancel(self) -> None:
        """Cancels the generation on the server, also one that is watched or kept. Does nothing after the end."""
        self._leave(Cancelled("Cancelled by this client."), cancel=True)

    def _leave(self, reason: CalotypeError | None = None, *, cancel: bool = False) -> None:
        """Closes the call, and tells the server where that does not say enough. Never waits."""
        resumption = self._resumption
        cancel = cancel or resumption.leaving_cancels
        if not self._assembler.ended:
            text = "Cancelled by this client." if cancel else "This client has left; `watch` follows it again."
            self._assembler.close(reason or Cancelled(text))
            self._left.set()
            self._call.cancel()
        if resumption.unsettled:
            resumption.settle()
            if cancel and resumption.lingers:
                self._client._part(resumption)

    @property
    def _patience(self) -> float | None:
        """Seconds to wait for a message. Without limit where the client was told to wait for a server."""
        client = self._client
        return None if client._how["wait_for_ready"] and not self._resumption.heard else client._stall_timeout

    def _take(self, message: v1.Progress) -> Progress | None:
        news = self._resumption.take(message)
        return None if news is None else self._assembler.feed(news)

    def _lost(self, error: CalotypeError) -> float | None:
        """Returns how long to wait before the next call, or None when there is none."""
        if self._assembler.ended:
            return None
        verdict = self._resumption.lost(error)
        if isinstance(verdict, CalotypeError):
            self._assembler.close(verdict)
            return None
        self._assembler.interrupt()
        notify, loss = self._client._retry.notify, self._resumption.last_loss
        if notify is not None and loss is not None:
            notify(loss, verdict)
        return verdict

    def _start_iterating(self) -> None:
        if self._iterated:
            raise GenerationConsumed
        self._iterated = True

    def __repr__(self) -> str:
        at = f"{self.progress.phase} {self.progress.step}/{self.progress.total_steps}" if self.progress else "started"
        return f"<{type(self).__name__} {self.id or '?'}: {at}>"


class Generation(_BaseGeneration):
    """A generation that has been started on the server.

    Iterate over it once for its `Progress`: the loop ends after success and raises a `CalotypeError` otherwise. A lost
    connection is made again, and the loop goes on, see `Client`.

    Leaving the loop early, by `break` or an exception, cancels the generation on the server, and so does leaving a
    `with` block around it. Where iterators are not freed at once, as in PyPy, only `with` cancels at once. A generation
    that was started with `on_disconnect="keep"`, or that is watched, goes on: only `cancel` cancels it.
    """

    _client: Client
    _call: SyncCall
    _left: threading.Event

    def __init__(self, client: Client, resumption: Resumption) -> None:
        super().__init__(resumption)
        self._client = client
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._call = client._call(resumption)

    def __iter__(self) -> Iterator[Progress]:
        self._start_iterating()
        try:
            while not self._assembler.ended:
                if (progress := self._advance()) is not None:
                    yield progress
            self._assembler.outcome()
        finally:
            self._leave()

    def result(self) -> Image:
        """Waits for the end and returns the final image. Can be called again, also within the loop.

        Raises:
            CalotypeError: The generation ended without an image.
        """
        try:
            while not self._assembler.ended:
                self._advance()
        finally:
            self._leave()
        return self._assembler.outcome()

    def finish(self) -> Phase:
        """Ends it early with the picture as it is, which becomes the final image.

        Waits for the first message, and up to 10 s for the answer.

        Returns:
            The phase in which the request found it. An end means that there was nothing left to finish.

        Raises:
            NotFound: It ended too long ago.
            CalotypeError: The call failed in another way, or the generation was refused.
            ClientClosed: The client has been closed.
        """
        while self.id is None and not self._assembler.ended:
            self._advance()
        if self.id is None:
            self._assembler.outcome()
        return self._client.finish(self.id or "")

    def _advance(self) -> Progress | None:
        """Takes one message, or makes the next call after one that has broken.

        At the end, takes the status as well: a call left before it counts as cancelled.
        """
        with self._lock:
            progress = None
            try:
                progress = self._take(self._client._watchdog.next(self._call, self._patience))
                if self._assembler.ended:
                    for _ in self._call:
                        pass
            except StopIteration:
                self._reconnect(self._lost(incomplete()))
            except Unavailable as error:
                self._reconnect(self._lost(error))
            except grpc.RpcError as error:
                self._reconnect(self._lost(from_rpc_error(error)))
            return progress

    def _reconnect(self, delay: float | None) -> None:
        if delay is None or self._left.wait(delay):
            return
        try:
            self._call = self._client._call_again(self._resumption)
        except ClientClosed:
            self._assembler.close(Cancelled("The client was closed."))
        # Who left at this moment has cancelled the call before.
        if self._assembler.ended:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()


class AsyncGeneration(_BaseGeneration):
    """A generation that has been started on the server.

    Iterate over it once for its `Progress`: the loop ends after success and raises a `CalotypeError` otherwise. A lost
    connection is made again, and the loop goes on, see `AsyncClient`.

    Leaving the loop early, by `break`, an exception or the cancellation of the task, cancels the generation on the
    server, and so does leaving an `async with` block around it. After a `break` the event loop does so as soon as it
    runs again; only `async with` cancels at once. A generation that was started with `on_disconnect="keep"`, or that is
    watched, goes on: only `cancel` cancels it.
    """

    _client: AsyncClient
    _call: AsyncCall
    _left: asyncio.Event

    def __init__(self, client: AsyncClient, resumption: Resumption) -> None:
        super().__init__(resumption)
        self._client = client
        self._lock = asyncio.Lock()
        self._left = asyncio.Event()
        self._call = client._call(resumption)
        self._messages = aiter(self._call)

    async def __aiter__(self) -> AsyncIterator[Progress]:
        self._start_iterating()
        try:
            while not self._assembler.ended:
                if (progress := await self._advance()) is not None:
                    yield progress
            self._assembler.outcome()
        finally:
            self._leave()

    async def result(self) -> Image:
        """Waits for the end and returns the final image. Can be called again, also within the loop.

        Raises:
            CalotypeError: The generation ended without an image.
        """
        try:
            while not self._assembler.ended:
                await self._advance()
        finally:
            self._leave()
        return self._assembler.outcome()

    async def finish(self) -> Phase:
        """Ends it early with the picture as it is, which becomes the final image.

        Waits for the first message, and up to 10 s for the answer.

        Returns:
            The phase in which the request found it. An end means that there was nothing left to finish.

        Raises:
            NotFound: It ended too long ago.
            CalotypeError: The call failed in another way, or the generation was refused.
            ClientClosed: The client has been closed.
        """
        while self.id is None and not self._assembler.ended:
            await self._advance()
        if self.id is None:
            self._assembler.outcome()
        return await self._client.finish(self.id or "")

    async def _advance(self) -> Progress | None:
        """Takes one message, or makes the next call after one that has broken.

        At the end, takes the status as well: a call left before it counts as cancelled.
        """
        async with self._lock:
            progress = None
            try:
                async with asyncio.timeout(self._patience):
                    message = await anext(self._messages)
                progress = self._take(message)
                if self._assembler.ended:
                    async for _ in self._messages:
                        pass
            except StopAsyncIteration:
                await self._reconnect(self._lost(incomplete()))
            except TimeoutError:
                self._call.cancel()
                await self._reconnect(self._lost(silence(self._client._stall_timeout or 0.0)))
            except grpc.RpcError as error:
                await self._reconnect(self._lost(from_rpc_error(error)))
            except asyncio.CancelledError:
                # gRPC raises this as well when only the call was cancelled, by the server or by `cancel`.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                call = self._call
                status = await call.code(), await call.details(), await call.trailing_metadata()
                await self._reconnect(self._lost(from_status(*status)))
            return progress

    async def _reconnect(self, delay: float | None) -> None:
        if delay is None or await self._has_left_within(delay):
            return
        try:
            self._call = await self._client._call_again(self._resumption)
        except ClientClosed:
            self._assembler.close(Cancelled("The client was closed."))
            return
        if self._assembler.ended:  # who left meanwhile has cancelled the call before
            self._call.cancel()
        self._messages = aiter(self._call)

    async def _has_left_within(self, delay: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._left.wait()
        return self._left.is_set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()
