"""Rejects gRPC calls without a valid key, before their request arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from calotype_server.errors import ServiceError, Unauthenticated
from calotype_server.transport.grpc.dispatch import EarlyHandler
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
    """Rejects calls without a valid key, except health checks.

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
        if not handler_call_details.method.startswith(_KEYLESS_PREFIX):
            try:
                # Only checks the key here; the servicer identifies the caller because it knows the peer address.
                self._access.authenticate(from_metadata(handler_call_details.invocation_metadata), "")
            except Unauthenticated as error:
                return EarlyHandler(_raising(error))
        handler: Handler | None = await continuation(handler_call_details)
        return handler


def _raising(error: ServiceError) -> Callable[[Any, Context], AsyncGenerator[Any, None]]:
    async def reject(_: Any, __: Context) -> AsyncGenerator[Any, None]:
        raise error
        yield

    return reject
