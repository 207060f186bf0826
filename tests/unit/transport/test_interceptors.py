"""The one wrapper around every gRPC handler: nesting, statuses, counting and limits."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import grpc
import pytest

from calotype_server.auth.access import Access
from calotype_server.errors import NotReady
from calotype_server.observability.events import CallEnded, CallRefused, MessageSent
from calotype_server.transport.grpc.context import AbortMixin
from calotype_server.transport.grpc.dispatch import CallDetails, find_handler
from calotype_server.transport.grpc.interceptors import interceptors
from calotype_server.transport.grpc.request_guard import RequestGuard
from calotype_server.transport.net.call_limits import CallLimiter

GENERATE = "/calotype.v1.GenerationService/Generate"


class Context(AbortMixin):
    """A context for one native call, whose request is b"request"."""

    def __init__(self) -> None:
        self._code: grpc.StatusCode | None = None
        self._unread: list[Any] = [grpc.aio.EOF, b"request"]

    async def read(self) -> Any:
        return self._unread.pop()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


class Services(grpc.GenericRpcHandler):
    """Offers one handler for every method."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self.handler


async def native(handler: Any, observed: list[Any] | None = None, *, max_calls: int = 9, path: str = GENERATE) -> Any:
    """Returns a handler as the native port wraps it."""
    observe = [].append if observed is None else observed.append
    chain = interceptors(Access(), "native", observe, RequestGuard(CallLimiter(max_calls), 1.0))
    return await find_handler(CallDetails(path, ()), chain, [Services(handler)])


def generators_on_the_stack() -> int:
    """Returns the number of async generators that the current frame runs in."""
    frame, count = sys._getframe(1), 0
    while frame is not None:
        count += bool(frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR)
        frame = frame.f_back
    return count


async def test_a_native_stream_has_one_generator_around_the_servicers() -> None:
    """All interceptors of the native port together add one async generator to a streaming call."""
    depths = []

    async def stream(request: bytes, context: Any):
        depths.append(generators_on_the_stack())
        yield request

    handler = await native(grpc.unary_stream_rpc_method_handler(stream))
    assert handler.request_streaming
    assert [message async for message in handler.stream_stream(None, Context())] == [b"request"]
    assert depths == [2]


async def test_calls_and_messages_are_counted() -> None:
    """A call is counted by its method and status, and each message by its size."""
    observed: list[Any] = []

    async def unary(request: bytes, context: Any) -> bytes:
        return b"answer"

    handler = await native(grpc.unary_unary_rpc_method_handler(unary), observed)
    handler.response_serializer(await handler.stream_unary(None, Context()))
    assert observed == [CallEnded("native", "Generate", "OK"), MessageSent("native", 6)]


async def test_an_error_becomes_the_status_of_the_call() -> None:
    """A ServiceError raised by the handler aborts the call and is counted with its status and its reason."""
    observed: list[Any] = []

    async def failing(request: bytes, context: Any) -> bytes:
        raise NotReady("Loading.")

    handler = await native(grpc.unary_unary_rpc_method_handler(failing), observed)
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await handler.stream_unary(None, context)
    assert context.code() is grpc.StatusCode.UNAVAILABLE
    assert observed == [CallRefused("NOT_READY"), CallEnded("native", "Generate", "UNAVAILABLE")]


async def test_a_rejected_call_is_counted_and_does_not_run() -> None:
    """A call above the limit of its host ends with RESOURCE_EXHAUSTED before its handler starts."""
    observed: list[Any] = []
    ran = []

    async def unary(request: bytes, context: Any) -> bytes:
        ran.append(request)
        return b""

    handler = await native(grpc.unary_unary_rpc_method_handler(unary), observed, max_calls=0)
    with pytest.raises(grpc.aio.AbortError):
        await handler.stream_unary(None, Context())
    assert ran == []
    assert observed == [CallRefused("TOO_MANY_CALLS"), CallEnded("native", "Generate", "RESOURCE_EXHAUSTED")]


async def test_long_lived_calls_are_not_counted() -> None:
    """Health `Watch`, which writes to the context, and reflection, which streams requests, are not counted."""
    observed: list[Any] = []

    async def write(request: bytes, context: Any) -> None: ...

    async def reflect(requests: Any, context: Any):
        yield b""

    watch = await native(grpc.unary_stream_rpc_method_handler(write), observed)
    await watch.stream_stream(None, Context())
    reflection = await native(grpc.stream_stream_rpc_method_handler(reflect), observed)
    assert [message async for message in reflection.stream_stream(None, Context())] == [b""]
    assert observed == []


async def test_an_unknown_method_is_rejected_before_its_request_arrives() -> None:
    """A client that streams requests to it gets the status at once, without sending one."""
    observed: list[Any] = []
    handler = await native(None, observed, path="/no.such.Service/Method")
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await anext(handler.stream_stream(None, context))
    assert context.code() is grpc.StatusCode.UNIMPLEMENTED
    assert observed == [CallRefused("METHOD_NOT_FOUND"), CallEnded("native", "other", "UNIMPLEMENTED")]
