"""A generation: iterate over its progress, wait for its result, or cancel it.

`Generation` and `AsyncGeneration` differ only in `await`.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Self, TypeAlias

import grpc
import grpc.aio

from ._assembler import Assembler
from ._errors import Cancelled, GenerationConsumed
from ._status import from_rpc_error, from_status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import TracebackType

    from ._image import Image
    from ._types import Notice, Progress
    from .v1 import calotype_pb2 as v1

    SyncCall: TypeAlias = grpc._CallIterator[v1.Progress]
    AsyncCall: TypeAlias = grpc.aio.UnaryStreamCall[v1.GenerateRequest, v1.Progress]

__all__ = ["AsyncGeneration", "Generation"]


class _BaseGeneration:
    """What needs no I/O."""

    def __init__(self, call: SyncCall | AsyncCall) -> None:
        self._leave = call.cancel
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
        """Leaves the stream, which cancels the generation on the server. Does nothing after the end."""
        if not self._assembler.ended:
            self._assembler.close(Cancelled("Cancelled by this client."))
            self._leave()

    def _start_iterating(self) -> None:
        if self._iterated:
            raise GenerationConsumed
        self._iterated = True

    def __repr__(self) -> str:
        at = f"{self.progress.phase} {self.progress.step}/{self.progress.total_steps}" if self.progress else "started"
        return f"<{type(self).__name__} {self.id or '?'}: {at}>"


class Generation(_BaseGeneration):
    """A generation that has been started on the server.

    Iterate over it once for its `Progress`: the loop ends after success and raises a `CalotypeError` otherwise.
    Leaving the loop early, by `break` or an exception, cancels the generation on the server, and so does leaving a
    `with` block around it. Where iterators are not freed at once, as in PyPy, only `with` cancels at once.
    """

    def __init__(self, call: SyncCall) -> None:
        super().__init__(call)
        self._call = call
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Progress]:
        self._start_iterating()
        try:
            while not self._assembler.ended:
                if (progress := self._advance()) is not None:
                    yield progress
            self._assembler.outcome()
        finally:
            self.cancel()

    def result(self) -> Image:
        """Waits for the end and returns the final image. Can be called again, also within the loop.

        Raises:
            CalotypeError: The generation ended without an image.
        """
        try:
            while not self._assembler.ended:
                self._advance()
        finally:
            self.cancel()
        return self._assembler.outcome()

    def _advance(self) -> Progress | None:
        """Takes one message. At the end, takes the status as well: a call left before it counts as cancelled."""
        with self._lock:
            progress = None
            try:
                progress = self._assembler.feed(next(self._call))
                if self._assembler.ended:
                    for _ in self._call:
                        pass
            except StopIteration:
                self._assembler.close()
            except grpc.RpcError as error:
                self._assembler.close(from_rpc_error(error))
            return progress

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncGeneration(_BaseGeneration):
    """A generation that has been started on the server.

    Iterate over it once for its `Progress`: the loop ends after success and raises a `CalotypeError` otherwise.
    Leaving the loop early, by `break`, an exception or the cancellation of the task, cancels the generation on the
    server, and so does leaving an `async with` block around it. After a `break` the event loop does so as soon as it
    runs again; only `async with` cancels at once.
    """

    def __init__(self, call: AsyncCall) -> None:
        super().__init__(call)
        self._call = call
        self._messages = aiter(call)
        self._lock = asyncio.Lock()

    async def __aiter__(self) -> AsyncIterator[Progress]:
        self._start_iterating()
        try:
            while not self._assembler.ended:
                if (progress := await self._advance()) is not None:
                    yield progress
            self._assembler.outcome()
        finally:
            self.cancel()

    async def result(self) -> Image:
        """Waits for the end and returns the final image. Can be called again, also within the loop.

        Raises:
            CalotypeError: The generation ended without an image.
        """
        try:
            while not self._assembler.ended:
                await self._advance()
        finally:
            self.cancel()
        return self._assembler.outcome()

    async def _advance(self) -> Progress | None:
        """Takes one message. At the end, takes the status as well: a call left before it counts as cancelled."""
        async with self._lock:
            progress = None
            try:
                progress = self._assembler.feed(await anext(self._messages))
                if self._assembler.ended:
                    async for _ in self._messages:
                        pass
            except StopAsyncIteration:
                self._assembler.close()
            except grpc.RpcError as error:
                self._assembler.close(from_rpc_error(error))
            except asyncio.CancelledError:
                # gRPC raises this as well when only the call was cancelled, by the server or by `cancel`.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                call = self._call
                self._assembler.close(
                    from_status(await call.code(), await call.details(), await call.trailing_metadata())
                )
            return progress

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
