"""What surrounds every call on every gRPC port: who may call, errors become statuses, log lines carry the call's id."""

from __future__ import annotations

import contextlib
import inspect
import secrets
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from calotype_server import codec
from calotype_server.errors import GenerationFailed, InvalidRequest, ServiceError, Unauthenticated, Violation
from calotype_server.transport.credentials import from_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

    from calotype_server.access import Access

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["AccessInterceptor", "CallInterceptor", "abort", "interceptors"]

_log = structlog.get_logger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Turns a `ServiceError` into its status; hides and logs every other exception.

    A call's log lines carry `request`, the caller's `x-request-id` or one drawn here.
    """

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
        if not handler.response_streaming:
            guarded = grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary), _tolerant(handler), handler.response_serializer
            )
            return guarded
        # grpc.aio looks at the function to learn its style: writers such as health.Watch stay what they are.
        if not inspect.isasyncgenfunction(handler.unary_stream):
            return handler
        guarded = grpc.unary_stream_rpc_method_handler(
            _guard_stream(handler.unary_stream), _tolerant(handler), handler.response_serializer
        )
        return guarded


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a good key before anything of them is read, but for health checks.

    Args:
        access: Decides.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

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
            self._access.admit(from_metadata(handler_call_details.invocation_metadata), "")
        except Unauthenticated as error:
            refusal: Handler = _refusal(error, streaming=handler is not None and handler.request_streaming)
            return refusal
        return handler


_OPEN = "/grpc.health.v1.Health/"
"""Load balancers have no keys."""


def interceptors(access: Access) -> tuple[grpc.aio.ServerInterceptor, ...]:
    """Returns those of every port, the outermost first."""
    return CallInterceptor(), AccessInterceptor(access)


def _refusal(error: ServiceError, *, streaming: bool) -> Any:
    """Returns a handler that answers with `error`; a client that asked for one message takes that, too."""

    async def refuse(_: Any, context: Context) -> AsyncGenerator[Any, None]:
        await abort(context, error)
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


def _guard_stream(method: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    async def guarded(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        with _bound(context):
            try:
                async with contextlib.aclosing(method(_well_formed(request), context)) as messages:
                    async for message in messages:
                        yield message
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await abort(context, error)

    return guarded


def _guard_unary(method: Any) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        with _bound(context):
            try:
                return await method(_well_formed(request), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await abort(context, error)

    return guarded


@contextlib.contextmanager
def _bound(context: Context) -> Iterator[None]:
    metadata = dict(context.invocation_metadata() or ())
    given = metadata.get("x-request-id", "")
    request_id = given[:64] if isinstance(given, str) and given.isprintable() and given else secrets.token_hex(4)
    structlog.contextvars.bind_contextvars(request=request_id)
    yield


async def abort(context: Context, error: Exception) -> None:
    """Ends a call with the status of an error; what is no `ServiceError` is logged and hidden."""
    if not isinstance(error, ServiceError):
        _log.error("call failed", exc_info=error)
        error = GenerationFailed("Internal error.")
    else:
        _log.info("call refused", reason=error.reason)
    await context.abort_with_status(rpc_status.to_status(codec.encode_error(error)))
