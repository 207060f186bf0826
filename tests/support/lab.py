"""Serves handler functions over any transport, for tests of how transports treat handlers."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from calotype_server.auth.access import Access
from calotype_server.transport.cluster.forwarder import Forwarder
from calotype_server.transport.cluster.upstreams import Upstreams
from calotype_server.transport.grpc.interceptors import interceptors
from calotype_server.transport.web.server import WebServer
from support.grpcweb import Connection, WebChannel, frame, read_answer
from support.service import open_channel, opener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NAME = "lab.v1.Lab"

PATIENCE = 20
"""Seconds until a test that waits for something gives up."""


@dataclass
class Lab:
    """A server under test."""

    address: str
    channel: Any
    server: Any

    def stream(self, method: str, request: bytes = b"", **options: Any) -> Any:
        """Calls a method that streams bytes."""
        return self.channel.unary_stream(f"/{NAME}/{method}")(request, **options)

    def unary(self, method: str, request: bytes = b"", **options: Any) -> Any:
        """Calls a method that returns bytes once."""
        return self.channel.unary_unary(f"/{NAME}/{method}")(request, **options)

    async def post(self, method: str, body: bytes | None = None, **headers: str) -> Connection:
        """Sends a request by hand; underscores in the names of headers stand for hyphens."""
        connection = await Connection.open(self.address)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        defaults = {"host": self.address, "content-type": "application/grpc-web+proto"}
        body = frame(b"") if body is None and "transfer-encoding" not in given else body
        await connection.request("POST", f"/{NAME}/{method}", {**defaults, **given}, body)
        return connection


def writer(function):
    """Marks a handler that streams its responses with `context.write`."""
    function.writes = True
    return function


def bidi(function):
    """Marks a handler that also receives a stream of requests."""
    function.reads = True
    return function


def handlers(methods: dict[str, Any]) -> grpc.GenericRpcHandler:
    """Returns a handler to register on a server; messages are plain bytes."""
    made = {}
    for name, function in methods.items():
        if hasattr(function, "reads"):
            make = grpc.stream_stream_rpc_method_handler
        elif inspect.isasyncgenfunction(function) or hasattr(function, "writes"):
            make = grpc.unary_stream_rpc_method_handler
        else:
            make = grpc.unary_unary_rpc_method_handler
        made[name] = make(function, request_deserializer=bytes, response_serializer=bytes)
    return grpc.method_handlers_generic_handler(NAME, made)


async def _always() -> bool:
    return True


@contextlib.asynccontextmanager
async def lab(transport: str = "grpc-web", methods: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Lab]:
    """Serves `methods` while the block runs.

    Args:
        transport: One of `support.service.GRPC_TRANSPORTS`.
        methods: Handler functions by method name.
        options: Of `WebServer`.
    """
    generic = handlers(methods or {})
    async with contextlib.AsyncExitStack() as stack:
        if transport in ("native", "bridge"):
            native = grpc.aio.server(interceptors=interceptors(Access()))
            native.add_generic_rpc_handlers([generic])
            address = f"127.0.0.1:{native.add_insecure_port('127.0.0.1:0')}"
            await native.start()
            stack.push_async_callback(native.stop, None)
            if transport == "native":
                channel = await stack.enter_async_context(open_channel(address))
                yield Lab(address, channel, native)
                return
            generic = Forwarder(await stack.enter_async_context(Upstreams([address], opener())))
        web = WebServer(
            "127.0.0.1:0",
            lambda server: server.add_generic_rpc_handlers([generic]),
            Access(),
            is_ready=options.pop("is_ready", _always),
            **options,
        )
        address = await web.start()
        stack.push_async_callback(web.stop, 0)
        web_channel = WebChannel(address, text=transport == "grpc-web-text")
        stack.callback(web_channel.close)
        yield Lab(address, web_channel, web)


async def echo(request, context):
    """A handler that returns the request."""
    yield request


async def until(condition) -> None:
    """Runs the event loop until the condition is true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the server has no event to wait for
            await asyncio.sleep(0)


async def run_loop(number: int) -> None:
    """Runs this many iterations of the event loop, so that pending callbacks have run."""
    for _ in range(number):
        await asyncio.sleep(0)


async def status(server, method: str, body: bytes | None = None, **given: str) -> str:
    """Returns the gRPC status of a call that ends without messages."""
    connection = await server.post(method, body, **given)
    messages, trailers = read_answer(await connection.answer(), text="text" in given.get("content_type", ""))
    connection.close()
    assert messages == []
    return trailers["grpc-status"]
