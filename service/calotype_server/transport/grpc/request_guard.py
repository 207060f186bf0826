"""What a native call must pass before its handler runs: its peer has few enough, and its request arrives in time."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import grpc

from calotype_server.errors import InvalidRequest, RequestTooLate, ServiceError, Violation
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.grpc.interceptors import abort

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from calotype_server.transport.net.call_limits import CallLimiter

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["RequestGuard"]


class RequestGuard(grpc.aio.ServerInterceptor):
    """Counts calls by peer, and reads their request itself; the outermost interceptor.

    gRPC waits for ever for the message of a call that has begun, and shows the call to nobody meanwhile. On the wire,
    one request is a stream of one: a handler of streams is called at once, and can stop waiting.

    Args:
        peers: Counts.
        seconds: For the request to arrive.
        observe: Told of refusals.
    """

    def __init__(self, peers: CallLimiter, seconds: float, observe: Observe = ignore) -> None:
        self._observe = observe
        self._peers = peers
        self._seconds = seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wraps every handler."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def stream(requests: Any, context: Context) -> AsyncGenerator[Any, None]:
            async with (
                self._admitted(handler, requests, context) as request,
                contextlib.aclosing(method(request, context)) as messages,
            ):
                async for message in messages:
                    yield message

        async def single(requests: Any, context: Context) -> Any:
            async with self._admitted(handler, requests, context) as request:
                return await method(request, context)

        streaming = handler.response_streaming
        make = grpc.stream_stream_rpc_method_handler if streaming else grpc.stream_unary_rpc_method_handler
        # grpc.aio looks at the function to learn its style: a generator, or one that writes or returns.
        function: Any = stream if inspect.isasyncgenfunction(method) else single
        admitted: Handler = make(function, handler.request_deserializer, handler.response_serializer)
        return admitted

    @contextlib.asynccontextmanager
    async def _admitted(self, handler: Handler, requests: Any, context: Context) -> AsyncIterator[Any]:
        """Yields what the handler is called with."""
        try:
            with self._peers.admit(context.peer()):
                yield requests if handler.request_streaming else await self._receive(context)
        except ServiceError as error:
            await abort(context, error, self._observe)

    async def _receive(self, context: Context) -> Any:
        try:
            async with asyncio.timeout(self._seconds):
                request = await context.read()
        except TimeoutError:
            raise RequestTooLate(f"The request had not arrived after {self._seconds:g} seconds.") from None
        if request is grpc.aio.EOF:
            raise InvalidRequest([Violation("request", "The call ended without one.")])
        return request
