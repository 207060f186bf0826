"""What surrounds every call on every gRPC port: who may call, errors become statuses, logs carry ids, it is counted."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api import encoding
from calotype_server.errors import GenerationFailed, InvalidRequest, ServiceError, Unauthenticated, Violation
from calotype_server.observability.events import CallEnded, CallRefused, MessageSent, Observe, ignore
from calotype_server.transport.net.credentials import from_metadata
from calotype_server.transport.net.request_id import bind_request_id, bind_traceparent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

    from calotype_server.auth.access import Access

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["AccessInterceptor", "CallInterceptor", "abort", "interceptors"]

_log = structlog.get_logger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]
_NAMES = {f"/{_SERVICE.full_name}/{method.name}": method.name for method in _SERVICE.methods}
"""Paths and short names of the methods that are counted by name: a bridge is asked for any."""

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Turns a `ServiceError` into its status; hides and logs every other exception.

    A call's log lines carry `request`, the caller's `x-request-id` or one drawn here, and `traceparent` if it has one.

    Args:
        transport: Its name in the metrics.
        observe: Told of calls and messages.
    """

    def __init__(self, transport: str, observe: Observe = ignore) -> None:
        self._transport = transport
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wraps the handlers whose requests are not streams; all of ours, and those of the health service."""
        handler = await continuation(handler_call_details)
        guarded: Handler
        if handler is None or handler.request_streaming:
            return handler
        serializer = self._counting(handler.response_serializer)
        name = _NAMES.get(handler_call_details.method, "other")
        if not handler.response_streaming:
            guarded = grpc.unary_unary_rpc_method_handler(
                self._guard_unary(handler.unary_unary, name), _tolerant(handler), serializer
            )
            return guarded
        # grpc.aio looks at the function to learn its style: writers such as health.Watch stay what they are.
        if not inspect.isasyncgenfunction(handler.unary_stream):
            return handler
        guarded = grpc.unary_stream_rpc_method_handler(
            self._guard_stream(handler.unary_stream, name), _tolerant(handler), serializer
        )
        return guarded

    def _counting(self, serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
        def counting(message: Any) -> bytes:
            data: bytes = message if serialize is None else serialize(message)
            self._observe(MessageSent(self._transport, len(data)))
            return data

        return counting

    def _guard_stream(
        self, method: Callable[..., AsyncGenerator[Any, None]], name: str
    ) -> Callable[..., AsyncGenerator[Any, None]]:
        async def guarded(request: Any, context: Context) -> AsyncGenerator[Any, None]:
            with self._entered(context, name):
                try:
                    async with contextlib.aclosing(method(_well_formed(request), context)) as messages:
                        async for message in messages:
                            yield message
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await abort(context, error, self._observe)

        return guarded

    def _guard_unary(self, method: Any, name: str) -> Callable[..., Awaitable[Any]]:
        async def guarded(request: Any, context: Context) -> Any:
            with self._entered(context, name):
                try:
                    return await method(_well_formed(request), context)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await abort(context, error, self._observe)

        return guarded

    @contextlib.contextmanager
    def _entered(self, context: Context, name: str) -> Iterator[None]:
        """Binds a call's ids, and counts it by its status."""
        metadata = dict(context.invocation_metadata() or ())
        bind_request_id(metadata.get("x-request-id"))
        bind_traceparent(metadata.get("traceparent"))
        code = "OK"
        try:
            yield
        except grpc.aio.AbortError:
            # A number in grpc.aio, and one of the enumeration over grpc-web.
            decided: Any = context.code()
            code = _CODES.get(getattr(decided, "value", (decided,))[0], "UNKNOWN")
            raise
        except BaseException:
            # The caller has left, or the deadline has passed; what the handler is told is the same.
            code = "CANCELLED"
            raise
        finally:
            self._observe(CallEnded(self._transport, name, code))


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a good key before anything of them is read, but for health checks.

    Args:
        access: Decides.
        observe: Told of refusals.
    """

    def __init__(self, access: Access, observe: Observe = ignore) -> None:
        self._access = access
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Passes a call on, or answers it with the refusal."""
        handler = await continuation(handler_call_details)
        if handler_call_details.method.startswith(_OPEN):
            return handler
        try:
            # Who it is, the servicer asks, which knows the peer.
            self._access.authenticate(from_metadata(handler_call_details.invocation_metadata), "")
        except Unauthenticated as error:
            streaming = handler is not None and handler.request_streaming
            refusal: Handler = _refusal(error, self._observe, streaming=streaming)
            return refusal
        return handler


_OPEN = "/grpc.health.v1.Health/"
"""Load balancers have no keys."""


def interceptors(
    access: Access, transport: str = "native", observe: Observe = ignore
) -> tuple[grpc.aio.ServerInterceptor, ...]:
    """Returns those of a port, the outermost first.

    Args:
        access: Decides who may call.
        transport: Name of the port in the metrics.
        observe: Told of calls and messages.
    """
    return CallInterceptor(transport, observe), AccessInterceptor(access, observe)


def _refusal(error: ServiceError, observe: Observe, *, streaming: bool) -> Any:
    """Returns a handler that answers with `error`; a client that asked for one message takes that, too."""

    async def refuse(_: Any, context: Context) -> AsyncGenerator[Any, None]:
        await abort(context, error, observe)
        yield

    make: Any = grpc.stream_stream_rpc_method_handler if streaming else grpc.unary_stream_rpc_method_handler
    return make(refuse)


class _Malformed:
    """Stands for a request that is no message of its type."""


def _tolerant(handler: Handler) -> Callable[[bytes], Any] | None:
    """Returns a deserializer that leaves refusing to the handler: gRPC's own answer is INTERNAL, as if it were ours."""
    deserialize = handler.request_deserializer
    if deserialize is None:
        return None

    def tolerant(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return tolerant


def _well_formed(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise InvalidRequest([Violation("request", "The bytes are no message of the type that the method takes.")])
    return request


async def abort(context: Context, error: Exception, observe: Observe) -> None:
    """Ends a call with the status of an error; what is no `ServiceError` is logged and hidden."""
    if not isinstance(error, ServiceError):
        _log.error("call failed", exc_info=error)
        error = GenerationFailed("Internal error.")
    else:
        _log.info("call refused", reason=error.reason)
    observe(CallRefused(error.reason))
    await context.abort_with_status(rpc_status.to_status(encoding.encode_error(error)))
