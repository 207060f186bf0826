"""Adapts a gRPC servicer to Ray Serve, which calls one method per RPC on a class. Does not import Ray.

Serve's ingress receives a call and then calls the method of that name. Its context has no deadline and no `abort`, and
it applies no interceptors. A status that a method sets before it returns keeps its details; raising loses them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.empty_pb2 import Empty

from calotype_server.transport.grpc.context import AbortMixin
from calotype_server.transport.grpc.dispatch import CallDetails, find_handler

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from google.protobuf.descriptor import ServiceDescriptor

    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["HandlerRegistry", "RayServicer", "rpc_methods"]


class Context(AbortMixin):
    """Adds to Serve's context the methods of `grpc.aio.ServicerContext` that servicers and interceptors use.

    Args:
        serve_context: The context that Serve passes to a method.
    """

    def __init__(self, serve_context: Any) -> None:
        self._serve_context = serve_context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._serve_context, name)

    def set_code(self, code: grpc.StatusCode) -> None:
        """Sets the status code."""
        self._serve_context.set_code(code)

    def set_details(self, details: str) -> None:
        """Sets the text of the status."""
        self._serve_context.set_details(details)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Sets the metadata to send with the status, in addition to Serve's own."""
        self._serve_context.set_trailing_metadata([tuple(pair) for pair in trailing_metadata])

    def time_remaining(self) -> float | None:
        """Returns None: the ingress cancels a call at its deadline, but does not reveal the deadline."""
        return None

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Does nothing: the ingress cannot send initial metadata of a method."""


class HandlerRegistry:
    """Collects handlers in place of a `grpc.aio.Server`; generated `add_..._to_server` functions accept it.

    Args:
        interceptors: Of every call, outermost first.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        self._interceptors = tuple(interceptors)
        self._registered: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Registers handlers."""
        self._registered.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """Does nothing: generated code registers the same handlers as generic ones."""

    async def find(self, details: grpc.HandlerCallDetails) -> Handler | None:
        """Returns the handler of a call, wrapped by the interceptors, or None for an unknown method."""
        return await find_handler(details, self._interceptors, self._registered)


class RayServicer:
    """Base of the classes that `rpc_methods` completes. Set `handlers` before the first call.

    Attributes:
        handlers: Answer the calls.
    """

    handlers: HandlerRegistry


def rpc_methods(service: ServiceDescriptor) -> Callable[[type[RayServicer]], type[RayServicer]]:
    """Returns a class decorator that adds a method for each RPC of a service. Request streams are not supported."""

    def decorate(cls: type[RayServicer]) -> type[RayServicer]:
        for method in service.methods:
            make: Any = _streaming if method.server_streaming else _unary
            function = make(f"/{service.full_name}/{method.name}")
            function.__name__ = method.name
            function.__qualname__ = f"{cls.__qualname__}.{method.name}"
            setattr(cls, method.name, function)
        return cls

    return decorate


# The functions below keep no reference to a descriptor: Ray pickles classes, and descriptors cannot be pickled.


def _streaming(path: str) -> Callable[..., AsyncGenerator[Any, None]]:
    async def call(self: RayServicer, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
        handler = await _find(self, path, grpc_context)
        with contextlib.suppress(grpc.aio.AbortError):
            async with contextlib.aclosing(handler.unary_stream(request, Context(grpc_context))) as messages:
                async for message in messages:
                    yield message

    return call


def _unary(path: str) -> Callable[..., Awaitable[Any]]:
    async def call(self: RayServicer, request: Any, grpc_context: Any) -> Any:
        handler, context = await _find(self, path, grpc_context), Context(grpc_context)
        with contextlib.suppress(grpc.aio.AbortError):
            if handler.unary_unary is not None:
                return await handler.unary_unary(request, context)
            # The interceptor that rejects calls always streams.
            async with contextlib.aclosing(handler.unary_stream(request, context)) as messages:
                return await anext(messages)
        return Empty()  # is not sent

    return call


async def _find(servicer: RayServicer, path: str, grpc_context: Any) -> Any:
    return await servicer.handlers.find(CallDetails(path, grpc_context.invocation_metadata()))
