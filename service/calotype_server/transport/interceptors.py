"""What surrounds every call on every gRPC port: errors become statuses, and log lines carry the call's id."""

from __future__ import annotations

import contextlib
import inspect
import secrets
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_status import rpc_status

from calotype_server import codec
from calotype_server.errors import GenerationFailed, ServiceError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

__all__ = ["CallInterceptor"]

_log = structlog.get_logger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Turns a `ServiceError` into its status; hides and logs every other exception.

    A call's log lines carry `request`, the caller's `x-request-id` or one drawn here.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wraps the handlers whose requests are not streams; all of ours, and those of the health service."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            # grpc.aio looks at the function to learn its style: writers such as health.Watch stay what they are.
            if not inspect.isasyncgenfunction(handler.unary_stream):
                return handler
            return grpc.unary_stream_rpc_method_handler(_guard_stream(handler.unary_stream), **codecs)
        return grpc.unary_unary_rpc_method_handler(_guard_unary(handler.unary_unary), **codecs)


def _guard_stream(method: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        with _bound(context):
            try:
                async with contextlib.aclosing(method(request, context)) as messages:  # type: ignore[type-var]
                    async for message in messages:
                        yield message
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _abort(context, error)

    return guarded


def _guard_unary(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        with _bound(context):
            try:
                return await method(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _abort(context, error)

    return guarded


@contextlib.contextmanager
def _bound(context: grpc.aio.ServicerContext) -> Any:
    metadata = dict(context.invocation_metadata() or ())
    given = metadata.get("x-request-id", "")
    request_id = given[:64] if isinstance(given, str) and given.isprintable() and given else secrets.token_hex(4)
    structlog.contextvars.bind_contextvars(request=request_id)
    yield


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    if not isinstance(error, ServiceError):
        _log.error("call failed", exc_info=error)
        error = GenerationFailed("Internal error.")
    else:
        _log.info("call refused", reason=error.reason)
    await context.abort_with_status(rpc_status.to_status(codec.encode_error(error)))
