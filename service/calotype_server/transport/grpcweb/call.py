"""One grpc-web call from its request to the one status that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from calotype_server.transport.grpcweb import framing
from calotype_server.transport.grpcweb.context import Context
from calotype_server.transport.grpcweb.framing import Refused, Status
from calotype_server.transport.grpcweb.response import Response, Stalled
from calotype_server.transport.net.body import Gone, TooLarge, TooSlow, read_body
from calotype_server.transport.net.credentials import peer_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from calotype_server.limits import PortLimits

    Handler = Any  # grpc.RpcMethodHandler, whose annotations are those of its synchronous half.
    Resolve = Callable[[Any], Awaitable[Handler | None]]

__all__ = ["Call"]

_log = structlog.get_logger(__name__)

_UNWIND_SECONDS = 5.0
"""For a handler to end after it was cancelled, before its call is answered without it."""


@dataclass(frozen=True, slots=True)
class _CallDetails(grpc.HandlerCallDetails):
    """What interceptors and handlers are asked with."""

    method: str
    invocation_metadata: Any


class Call:
    """Runs one call.

    The handler runs in a task of its own. Beside it, others may decide how the call ends: the deadline, the client who
    leaves, the server that stops. The first to decide wins; then the handler is cancelled, has ended, and only then
    the status is sent. So nothing is ever sent after it, nor a second one.

    Args:
        path: Method, as /package.Service/Method.
        scope: Of ASGI.
        receive: Likewise.
        send: Likewise.
        text: Whether the client speaks base64.
        limits: What it may take.
    """

    def __init__(self, path: str, scope: Any, receive: Any, send: Any, *, text: bool, limits: PortLimits) -> None:
        self.peer = peer_of(scope)
        """As gRPC writes addresses, such as ipv4:127.0.0.1:4711."""
        self._path = path
        self._scope = scope
        self._receive = receive
        self._text = text
        self._limits = limits
        self._response = Response(send, text=text, timeout=limits.stall_seconds)
        self._verdict: asyncio.Future[Status | None] = asyncio.get_running_loop().create_future()
        self._context: Context | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def end(self, status: Status | None) -> None:
        """Ends the call with `status`, or without a word when it is None; ignored when it has been decided."""
        if not self._verdict.done():
            self._verdict.set_result(status)

    async def run(self, resolve: Resolve) -> None:
        """Answers the call.

        Args:
            resolve: Finds the handler of a method.
        """
        handling = asyncio.create_task(self._handle(resolve))
        deciders: list[asyncio.Future[Any]] = [handling, self._verdict]
        try:
            await asyncio.wait(deciders, return_when=asyncio.FIRST_COMPLETED)
        finally:
            decided = self._verdict.done()
            for bystander in (self._watcher, self._deadline):
                if bystander is not None:
                    bystander.cancel()
            self._response.close()
            handling.cancel()
            handling.add_done_callback(_retrieve)
            await asyncio.wait({handling}, timeout=_UNWIND_SECONDS)
            if self._context is not None:
                self._context.finish(cancelled=decided)
        try:
            status = self._verdict.result() if decided else self._outcome(handling)
            if status is not None:
                await self._response.finish(status)
        except Gone:
            return
        except Stalled:
            # Not finishing makes the server close the connection.
            _log.warning("a reader stalled and was dropped", seconds=self._limits.stall_seconds)

    async def _handle(self, resolve: Resolve) -> None:
        if self._verdict.done():
            return
        headers = self._scope["headers"]
        timeout = framing.header(headers, b"grpc-timeout")
        seconds = None if timeout is None else framing.parse_timeout(timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        if seconds is not None:
            exceeded = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            self._deadline = asyncio.get_running_loop().call_later(seconds, self.end, exceeded)
        metadata = framing.decode_metadata(headers)
        handler = await resolve(_CallDetails(self._path, metadata))
        if handler is None:
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        if handler.request_streaming:
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, "A browser cannot stream requests: use the gRPC port.")
        data = await self._read()
        try:
            request = data if handler.request_deserializer is None else handler.request_deserializer(data)
        except Exception:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT, "The request is no message of the type that the method takes."
            ) from None
        self._watcher = asyncio.create_task(self._watch())
        self._context = Context(self._response, metadata, deadline, self.peer)
        self._context.serializer = handler.response_serializer
        await _invoke(handler, request, self._context)

    async def _read(self) -> bytes:
        """Reads the request to its end."""
        limit = self._limits.max_request_bytes
        most = framing.wire_size(limit, text=self._text)
        seconds = self._limits.request_seconds
        try:
            body = await read_body(self._scope, self._receive, most=most, seconds=seconds)
        except TooLarge:
            large = f"The request is larger than {limit} bytes."
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, large) from None
        except TooSlow:
            late = f"The request had not arrived after {seconds:g} seconds."
            raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, late) from None
        return framing.decode_request(body, text=self._text)

    async def _watch(self) -> None:
        """Waits for the client to leave, whatever the handler is doing."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end(None)

    def _outcome(self, handling: asyncio.Task[None]) -> Status:
        """Returns the status of a call whose handler has ended by itself."""
        if handling.cancelled():
            return Status(grpc.StatusCode.CANCELLED, "The call was cancelled by the server.")
        error = handling.exception()
        if error is None or isinstance(error, grpc.aio.AbortError):
            assert self._context is not None
            return self._context.status
        if isinstance(error, Refused):
            return error.status
        if isinstance(error, (Gone, Stalled)):
            raise error
        # The interceptors let none through; this is for what they leave alone, such as serializers.
        _log.error("call failed", method=self._path, exc_info=error)
        return Status(grpc.StatusCode.UNKNOWN, "Internal error.")


async def _invoke(handler: Handler, request: Any, context: Context) -> None:
    """Runs a handler in either of grpc.aio's styles: a generator or coroutine that returns, or one that writes."""
    if not handler.response_streaming:
        answer = await handler.unary_unary(request, context)
        if context.status.code is grpc.StatusCode.OK:
            await context.write(answer)
        return
    answers = handler.unary_stream(request, context)
    if inspect.isawaitable(answers):
        await answers
        return
    # Closed here and now, in this task: cancelling must not leave it to the garbage collector.
    async with contextlib.aclosing(answers):
        async for answer in answers:
            await context.write(answer)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Keeps asyncio from reporting the error of a handler that was cancelled and raised something else."""
    if not task.cancelled():
        task.exception()
