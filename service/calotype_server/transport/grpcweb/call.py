"""Runs one grpc-web call from its request to its final status."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from calotype_server.errors import (
    Cancelled,
    DeadlineExceeded,
    GenerationFailed,
    MethodNotFound,
    RequestStreamUnsupported,
    RequestUnreadable,
    ServiceError,
)
from calotype_server.failpoints import hit
from calotype_server.transport.grpc.dispatch import CallDetails, EarlyHandler
from calotype_server.transport.grpc.status import to_status
from calotype_server.transport.grpcweb import framing
from calotype_server.transport.grpcweb.context import Context
from calotype_server.transport.grpcweb.framing import Status
from calotype_server.transport.grpcweb.response import Response, Stalled
from calotype_server.transport.net.body import ClientGone, read_body
from calotype_server.transport.net.credentials import peer_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from calotype_server.limits import PortLimits

    Handler = Any  # grpc.RpcMethodHandler, whose annotations describe its synchronous variant.
    FindHandler = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]

__all__ = ["Call", "status_of"]

_log = structlog.get_logger(__name__)

_UNWIND_SECONDS = 5.0
"""Time for a cancelled handler to end before the status is sent without waiting for it."""


class Call:
    """Runs one call.

    The handler runs in its own task. The deadline, a disconnecting client or a stopping server can also end the call;
    the first of them decides the status. Then the handler is cancelled, and the status is sent after it has ended. So
    the status is sent once, and nothing follows it.

    Args:
        path: The method, as /package.Service/Method.
        scope: The ASGI scope.
        receive: The ASGI receive function.
        send: The ASGI send function.
        text: Whether the client uses base64 (grpc-web-text).
        limits: Sizes and timeouts.
    """

    def __init__(self, path: str, scope: Any, receive: Any, send: Any, *, text: bool, limits: PortLimits) -> None:
        self.peer = peer_of(scope)
        """Address of the client in gRPC's notation, such as ipv4:127.0.0.1:4711."""
        self._path = path
        self._scope = scope
        self._receive = receive
        self._text = text
        self._limits = limits
        self._response = Response(send, text=text, timeout=limits.stall_seconds)
        self._decision: asyncio.Future[Status | None] = asyncio.get_running_loop().create_future()
        self._context: Context | None = None
        self._disconnect_watcher: asyncio.Task[None] | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None

    def end(self, status: Status | None) -> None:
        """Ends the call with `status`; None closes it without one. Does nothing if the status is already decided."""
        if not self._decision.done():
            self._decision.set_result(status)

    async def run(self, find_handler: FindHandler, admit: Callable[[], object]) -> None:
        """Answers the call.

        Args:
            find_handler: Returns the handler of a method, or None.
            admit: Called before the request is read. Raises a `ServiceError` if the host has too many calls.
        """
        handling = asyncio.create_task(self._handle(find_handler, admit))
        deciders: list[asyncio.Future[Any]] = [handling, self._decision]
        try:
            await asyncio.wait(deciders, return_when=asyncio.FIRST_COMPLETED)
        finally:
            decided = self._decision.done()
            for pending in (self._disconnect_watcher, self._deadline_timer):
                if pending is not None:
                    pending.cancel()
            self._response.close()
            handling.cancel()
            handling.add_done_callback(_retrieve_exception)
            await asyncio.wait({handling}, timeout=_UNWIND_SECONDS)
            if self._context is not None:
                self._context.finish(cancelled=decided)
        try:
            status = self._decision.result() if decided else self._outcome(handling)
            if status is not None:
                await self._response.finish(status)
        except ClientGone:
            return
        except Stalled:
            # Returning without a final event makes the server close the connection.
            _log.warning("dropped a stalled reader", seconds=self._limits.stall_seconds)

    async def _handle(self, find_handler: FindHandler, admit: Callable[[], object]) -> None:
        if self._decision.done():
            return
        hit("grpcweb.call")
        headers = self._scope["headers"]
        deadline = self._start_deadline(framing.header(headers, b"grpc-timeout"))
        metadata = framing.decode_metadata(headers)
        handler = await find_handler(CallDetails(self._path, metadata))
        if handler is None:
            raise MethodNotFound("This port has no such method.")
        request = None
        if not isinstance(handler, EarlyHandler):
            if handler.request_streaming:
                raise RequestStreamUnsupported("grpc-web cannot stream requests: call this method on the gRPC port.")
            admit()
            request = self._decode(handler, await self._read())
            self._disconnect_watcher = asyncio.create_task(self._watch_disconnect())
        self._context = Context(self._response, metadata, deadline, self.peer)
        self._context.serializer = handler.response_serializer
        await _invoke(handler, request, self._context)

    def _start_deadline(self, timeout: str | None) -> float | None:
        """Ends the call when its `grpc-timeout` has passed. Returns the deadline on the clock of `time.monotonic`."""
        if timeout is None:
            return None
        seconds = framing.parse_timeout(timeout)
        exceeded = status_of(DeadlineExceeded("The deadline of the call has passed."))
        self._deadline_timer = asyncio.get_running_loop().call_later(seconds, self.end, exceeded)
        return time.monotonic() + seconds

    async def _read(self) -> bytes:
        """Returns the bytes of the request message."""
        limits = self._limits
        body = await read_body(
            self._scope,
            self._receive,
            max_bytes=limits.max_request_bytes,
            seconds=limits.request_seconds,
            max_wire_bytes=framing.wire_size(limits.max_request_bytes, text=self._text),
        )
        encoding = framing.header(self._scope["headers"], b"grpc-encoding")
        return framing.decode_request(body, text=self._text, encoding=encoding)

    def _decode(self, handler: Handler, data: bytes) -> Any:
        try:
            return data if handler.request_deserializer is None else handler.request_deserializer(data)
        except Exception:
            raise RequestUnreadable("Could not decode the request.") from None

    async def _watch_disconnect(self) -> None:
        """Ends the call when the client disconnects, even while the handler waits for something else."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end(None)

    def _outcome(self, handling: asyncio.Task[None]) -> Status:
        """Returns the status of a call whose handler ended without an external reason."""
        if handling.cancelled():
            return status_of(Cancelled("The call was cancelled by the server."))
        error = handling.exception()
        if error is None or isinstance(error, grpc.aio.AbortError):
            assert self._context is not None
            return self._context.status
        if isinstance(error, ServiceError):
            return status_of(error)
        if isinstance(error, (ClientGone, Stalled)):
            raise error
        # The interceptors convert what handlers raise; this is for errors outside of them, such as in serializers.
        _log.error("call failed", method=self._path, exc_info=error)
        return status_of(GenerationFailed("Internal error."))


def status_of(error: ServiceError) -> Status:
    """Returns the status of an error, with its details."""
    status: Any = to_status(error)
    return Status(status.code, status.details, status.trailing_metadata)


async def _invoke(handler: Handler, request: Any, context: Context) -> None:
    """Runs a handler in any of grpc.aio's styles: it yields messages, returns one, or writes to the context."""
    if not handler.response_streaming:
        message = await handler.unary_unary(request, context)
        if context.status.code is grpc.StatusCode.OK:
            await context.write(message)
        return
    messages = handler.unary_stream(request, context)
    if inspect.isawaitable(messages):
        await messages
        return
    # Closes the generator here, in this task: after a cancel it must not wait for the garbage collector.
    async with contextlib.aclosing(messages):
        async for message in messages:
            await context.write(message)


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    """Keeps asyncio from logging the exception of a handler that was cancelled and raised something else."""
    if not task.cancelled():
        task.exception()
