"""Finds the handler of a call and applies interceptors to it, as grpc.aio does, for ports that are not grpc.aio's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["CallDetails", "EarlyHandler", "find_handler"]


@dataclass(frozen=True, slots=True)
class CallDetails(grpc.HandlerCallDetails):
    """Method path, as /package.Service/Method, and metadata of a call, as interceptors receive them."""

    method: str
    invocation_metadata: Any


class EarlyHandler(grpc.RpcMethodHandler):  # type: ignore[type-arg]
    """A handler that ports call as soon as the headers of a call arrive, because it needs no request.

    Its requests and responses are streams, which also suits clients of unary methods.

    Args:
        method: Receives the request, if it has already arrived, and the context.
    """

    request_streaming = True
    response_streaming = True
    request_deserializer = None
    response_serializer = None
    unary_unary = None
    stream_unary = None

    def __init__(self, method: Callable[[Any, Any], AsyncGenerator[Any, None]]) -> None:
        function: Any = method  # The annotations of grpc describe synchronous handlers.
        self.unary_stream = self.stream_stream = function


async def find_handler(
    details: grpc.HandlerCallDetails,
    interceptors: Sequence[grpc.aio.ServerInterceptor],
    registered: Iterable[grpc.GenericRpcHandler],
) -> Handler | None:
    """Returns the handler of a call, wrapped by the interceptors, or None for an unknown method.

    Args:
        details: Of the call.
        interceptors: Outermost first.
        registered: The services of the port.
    """

    async def intercepted(index: int, details: grpc.HandlerCallDetails) -> Any:
        if index == len(interceptors):
            return next(filter(None, (services.service(details) for services in registered)), None)
        return await interceptors[index].intercept_service(lambda given: intercepted(index + 1, given), details)

    handler: Handler | None = await intercepted(0, details)
    return handler
