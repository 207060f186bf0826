"""Rejects gRPC calls without a valid key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from calotype_server.errors import ServiceError, Unauthenticated
from calotype_server.transport.net.credentials import from_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from calotype_server.auth.access import Access

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Any]

__all__ = ["KeyCheckInterceptor"]

_KEYLESS_PREFIX = "/grpc.health.v1.Health/"
"""Health checks need no key: load balancers have none."""


class KeyCheckInterceptor(grpc.aio.ServerInterceptor):
    """Rejects calls without a valid key before their request is decoded, except health checks.

    `CallInterceptor` must surround it: it turns the error into the status.

    Args:
        access: Checks keys.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Returns the handler of the method, or one that rejects the call."""
        handler: Handler | None = await continuation(handler_call_details)
        if handler_call_details.method.startswith(_KEYLESS_PREFIX):
            return handler
        try:
            # Only checks the key here; the servicer identifies the caller because it knows the peer address.
            self._access.authenticate(from_metadata(handler_call_details.invocation_metadata), "")
        except Unauthenticated as error:
            return _rejecting(error, request_streaming=handler is not None and handler.request_streaming)
        return handler


def _rejecting(error: ServiceError, *, request_streaming: bool) -> Handler:
    """Returns a handler that raises `error`. It streams its response, which also suits clients of unary methods."""

    async def reject(_: Any, __: Context) -> AsyncGenerator[Any, None]:
        raise error
        yield

    make: Any = grpc.stream_stream_rpc_method_handler if request_streaming else grpc.unary_stream_rpc_method_handler
    handler: Handler = make(reject)
    return handler
