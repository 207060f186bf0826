"""The interceptors of every gRPC port. The outer one turns errors into statuses, binds log ids and counts calls."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import MethodNotFound, RequestUnreadable
from calotype_server.observability.events import CallEnded, MessageSent, Observe, ignore
from calotype_server.transport.grpc.dispatch import EarlyHandler
from calotype_server.transport.grpc.key_check import KeyCheckInterceptor
from calotype_server.transport.grpc.status import abort
from calotype_server.transport.net.request_id import bind_request_id, bind_traceparent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from calotype_server.auth.access import Access
    from calotype_server.transport.grpc.request_guard import RequestGuard

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Any]

__all__ = ["CallInterceptor", "interceptors"]

_SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]
_METHOD_NAMES = {f"/{_SERVICE.full_name}/{method.name}": method.name for method in _SERVICE.methods}
"""Short names of the methods that metrics count by name. A bridge can receive any other path."""

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}

_MAKE_HANDLER: dict[tuple[bool, bool], Any] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""Makes a handler, by whether its requests and its responses are streams."""


def interceptors(
    access: Access, transport: str = "native", observe: Observe = ignore, guard: RequestGuard | None = None
) -> tuple[grpc.aio.ServerInterceptor, ...]:
    """Returns the interceptors of a port, outermost first.

    Args:
        access: Checks keys.
        transport: Name of the port in the metrics.
        observe: Receives events about calls and messages.
        guard: Limits calls and reads requests; only for the native port, see `RequestGuard`.
    """
    return CallInterceptor(transport, observe, guard), KeyCheckInterceptor(access)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler to convert errors, bind log ids and count calls.

    The wrapper converts a `ServiceError` into its gRPC status, and logs and hides every other exception. It binds
    `request` (the caller's `x-request-id`, or a new id) and `traceparent` to the log. It counts calls and messages.
    With a guard, it also limits the calls of each host and waits for the request with a timeout. An `EarlyHandler` is
    exempt from both, because it ends the call at once.

    It does not count calls that may stay open without work: those that stream requests (reflection), and those that
    write to the context instead of yielding (health `Watch`).

    Args:
        transport: Name of the port in the metrics.
        observe: Receives events about calls and messages.
        guard: Limits calls and reads requests; None where the port does both itself.
    """

    def __init__(self, transport: str, observe: Observe = ignore, guard: RequestGuard | None = None) -> None:
        self._transport = transport
        self._observe = observe
        self._guard = guard

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Returns the wrapped handler of a method; for an unknown method, one that rejects the call."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            handler = EarlyHandler(_not_found)
        method = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        yields, early = inspect.isasyncgenfunction(method), isinstance(handler, EarlyHandler)
        counted = early or (not handler.request_streaming and (yields or not handler.response_streaming))
        name = _METHOD_NAMES.get(handler_call_details.method, "other") if counted else None

        async def stream(request: Any, context: Context) -> AsyncGenerator[Any, None]:
            async with (
                self._call(handler, name, request, context) as received,
                contextlib.aclosing(method(received, context)) as messages,
            ):
                async for message in messages:
                    yield message

        async def single(request: Any, context: Context) -> Any:
            async with self._call(handler, name, request, context) as received:
                return await method(received, context)

        if early:
            return EarlyHandler(stream)
        # A guarded handler reads its one request from a stream, see `RequestGuard`.
        request_streaming = handler.request_streaming or self._guard is not None
        # grpc.aio inspects the function: generators yield their messages, coroutines return or write them.
        wrapped: Handler = _MAKE_HANDLER[request_streaming, handler.response_streaming](
            stream if yields else single,
            handler.request_deserializer if handler.request_streaming else _lenient(handler.request_deserializer),
            self._counting(handler.response_serializer) if counted else handler.response_serializer,
        )
        return wrapped

    @contextlib.asynccontextmanager
    async def _call(self, handler: Handler, name: str | None, request: Any, context: Context) -> AsyncIterator[Any]:
        """Runs one call: yields the request for its method, and aborts the call if the method raises."""
        with self._recorded(context, name):
            try:
                async with contextlib.AsyncExitStack() as stack:
                    if self._guard is not None and not isinstance(handler, EarlyHandler):
                        stack.enter_context(self._guard.admit(context))
                        if not handler.request_streaming:
                            request = await self._guard.receive(context)
                    yield _decoded(request)
            except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as error:
                # grpc.aio leaves the caller without an answer if an exception is not an `Exception`.
                await abort(context, error, self._observe)

    @contextlib.contextmanager
    def _recorded(self, context: Context, name: str | None) -> Iterator[None]:
        """Binds the ids of a call to the log, and counts the call by its status unless `name` is None."""
        metadata = dict(context.invocation_metadata() or ())
        bind_request_id(metadata.get("x-request-id"))
        bind_traceparent(metadata.get("traceparent"))
        code = "OK"
        try:
            yield
        except grpc.aio.AbortError:
            # grpc.aio stores a number, our grpc-web context stores the enum.
            stored: Any = context.code()
            code = _CODES.get(getattr(stored, "value", (stored,))[0], "UNKNOWN")
            raise
        except BaseException:
            # The client disconnected or its deadline passed; a handler cannot tell which.
            code = "CANCELLED"
            raise
        finally:
            if name is not None:
                self._observe(CallEnded(self._transport, name, code))

    def _counting(self, serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
        def counting(message: Any) -> bytes:
            data: bytes = message if serialize is None else serialize(message)
            self._observe(MessageSent(self._transport, len(data)))
            return data

        return counting


class _Undecodable:
    """Replaces a request whose bytes cannot be decoded."""


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Returns a deserializer that does not raise, so that the wrapper can add details to the status.

    gRPC itself would answer without them, and grpc.aio would log a traceback for every such request.
    """
    if deserialize is None:
        return None

    def lenient(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Undecodable()

    return lenient


def _decoded(request: Any) -> Any:
    if isinstance(request, _Undecodable):
        raise RequestUnreadable("Could not decode the request.")
    return request


async def _not_found(_: Any, __: Context) -> AsyncGenerator[Any, None]:
    raise MethodNotFound("This port has no such method.")
    yield
