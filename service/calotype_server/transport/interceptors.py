"""What surrounds every call on every gRPC port: errors become statuses, and log lines carry the call's id."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from calotype_server import codec
from calotype_server.errors import GenerationFailed, InvalidRequest, ServiceError, Violation
from calotype_server.transport.request_id import bind_request_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["INTERCEPTORS", "CallInterceptor"]

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


INTERCEPTORS: tuple[grpc.aio.ServerInterceptor, ...] = (CallInterceptor(),)
"""Those of every port, the outermost first."""


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
                await _abort(context, error)

    return guarded


def _guard_unary(method: Any) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        with _bound(context):
            try:
                return await method(_well_formed(request), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _abort(context, error)

    return guarded


@contextlib.contextmanager
def _bound(context: Context) -> Iterator[None]:
    metadata = dict(context.invocation_metadata() or ())
    bind_request_id(metadata.get("x-request-id"))
    yield


async def _abort(context: Context, error: Exception) -> None:
    if not isinstance(error, ServiceError):
        _log.error("call failed", exc_info=error)
        error = GenerationFailed("Internal error.")
    else:
        _log.info("call refused", reason=error.reason)
    await context.abort_with_status(rpc_status.to_status(codec.encode_error(error)))
