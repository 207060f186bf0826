"""A gRPC servicer as a class whose methods Ray Serve calls, one for each RPC. Knows nothing of Ray but that.

Serve's ingress reads a call for us, and then asks the method of that name, with a context that has no deadline, no
interceptors before it and no `abort`. A status that is set by a method that then returns passes with its details; one
that is raised loses them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.empty_pb2 import Empty

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from google.protobuf.descriptor import ServiceDescriptor

    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["HandlerRegistry", "RayServicer", "rpc_methods"]


@dataclass(frozen=True, slots=True)
class _CallDetails(grpc.HandlerCallDetails):
    """What interceptors are asked with."""

    method: str
    invocation_metadata: Any


class Context:
    """What servicers and interceptors ask of a call, on top of what the ingress tells of it.

    Args:
        given: The context of Serve.
    """

    def __init__(self, given: Any) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)

    def time_remaining(self) -> float | None:
        """Returns None: the ingress cancels a call at its deadline, and does not tell it before."""
        return None

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Decides what comes with the status, beside what Serve sends."""
        self._given.set_trailing_metadata([tuple(pair) for pair in trailing_metadata])

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Does nothing: the ingress sends none of ours."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Ends the call by raising.

        Raises:
            grpc.aio.AbortError: Always.
        """
        self._given.set_code(code)
        self._given.set_details(details)
        self.set_trailing_metadata(trailing_metadata)
        raise grpc.aio.AbortError("Locally aborted.")

    async def abort_with_status(self, status: Any) -> NoReturn:
        """Ends the call by raising, as `abort` does."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())


class HandlerRegistry:
    """Stands for a `grpc.aio.Server` where servicers are registered.

    Args:
        interceptors: As those of a server, the outermost first.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        self._interceptors = tuple(interceptors)
        self._generic: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Registers handlers."""
        self._generic.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """Does nothing: generated code registers the same as generic handlers."""

    async def resolve(self, details: grpc.HandlerCallDetails) -> Handler:
        """Asks the interceptors, and at last what is registered."""

        async def ask(index: int, details: grpc.HandlerCallDetails) -> Any:
            if index == len(self._interceptors):
                return next(filter(None, (handler.service(details) for handler in self._generic)), None)
            return await self._interceptors[index].intercept_service(lambda given: ask(index + 1, given), details)

        handler: Handler = await ask(0, details)
        return handler


class RayServicer:
    """Base of what `rpc_methods` makes. `handlers` is to be set before the first call.

    Attributes:
        handlers: Answer the calls.
    """

    handlers: HandlerRegistry


def rpc_methods(service: ServiceDescriptor) -> Callable[[type[RayServicer]], type[RayServicer]]:
    """Returns a class decorator that adds a method for each RPC of a service. No RPC may stream its requests."""

    def decorate(cls: type[RayServicer]) -> type[RayServicer]:
        for method in service.methods:
            make: Any = _streaming if method.server_streaming else _single
            function = make(f"/{service.full_name}/{method.name}")
            function.__name__ = method.name
            function.__qualname__ = f"{cls.__qualname__}.{method.name}"
            setattr(cls, method.name, function)
        return cls

    return decorate


# Of a descriptor nothing is kept below: Ray pickles classes, and descriptors cannot be.


def _streaming(path: str) -> Callable[..., AsyncGenerator[Any, None]]:
    async def call(self: RayServicer, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
        handler, context = await _resolve(self, path, grpc_context)
        with contextlib.suppress(grpc.aio.AbortError):
            async with contextlib.aclosing(handler.unary_stream(request, context)) as messages:
                async for message in messages:
                    yield message

    return call


def _single(path: str) -> Callable[..., Awaitable[Any]]:
    async def call(self: RayServicer, request: Any, grpc_context: Any) -> Any:
        handler, context = await _resolve(self, path, grpc_context)
        with contextlib.suppress(grpc.aio.AbortError):
            if handler.unary_unary is not None:
                return await handler.unary_unary(request, context)
            # An interceptor's refusal, which suits every method.
            async with contextlib.aclosing(handler.unary_stream(request, context)) as messages:
                return await anext(messages)
        return Empty()  # is not sent

    return call


async def _resolve(delegate: RayServicer, path: str, given: Any) -> tuple[Any, Context]:
    details = _CallDetails(path, given.invocation_metadata())
    return await delegate.handlers.resolve(details), Context(given)
