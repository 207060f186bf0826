"""Calls of a web port passed on to another server, as bytes: no message is decoded, so any service passes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import grpc

from calotype_server.errors import UpstreamUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["CHANNEL_OPTIONS", "Forwarder"]

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    # A generation may wait in the queue for minutes without a byte: pings notice a dead link meanwhile.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A generation that was started twice costs twice; the caller decides.
    ("grpc.enable_retries", 0),
    # A server that comes back is found again soon.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 3_000),
]

_METHOD = re.compile(r"/\w+(\.\w+)+/\w+")
_DETAILS = "grpc-status-details-bin"
_RETRY_SECONDS = 2.0


class Forwarder(grpc.GenericRpcHandler):
    """Answers every method with what an upstream answers: messages, metadata, status; deadline and cancel go with it.

    A method that answers once is a stream of one message here, which grpc-web does not tell apart.

    Args:
        channel: To the upstream.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Returns a handler for every /package.Service/Method."""
        path = handler_call_details.method
        if not _METHOD.fullmatch(path):
            return None

        async def forward(request: bytes, context: Context) -> AsyncGenerator[bytes, None]:
            method: Any = self._channel.unary_stream(path)
            metadata = _outgoing(context.invocation_metadata())
            call = method(request, timeout=context.time_remaining(), metadata=metadata)
            try:
                await context.send_initial_metadata(_returning(await call.initial_metadata()))
                async for message in call:
                    yield message
                context.set_trailing_metadata(_returning(await call.trailing_metadata()))
            except grpc.aio.AioRpcError as error:
                await _fail(error, context)
            finally:
                call.cancel()

        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(forward)
        return handler


async def _fail(error: grpc.aio.AioRpcError, context: Context) -> None:
    trailing = error.trailing_metadata() or ()
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE and not any(key == _DETAILS for key, _ in trailing):
        # gRPC's own words for a connection that failed: addresses and system errors, which are not the caller's.
        text = "The server behind this bridge cannot be reached."
        raise UpstreamUnavailable(text, retry_after=_RETRY_SECONDS) from None
    await context.abort(code, error.details() or "", _returning(trailing))


def _outgoing(metadata: Any) -> list[tuple[str, Any]]:
    # gRPC names itself, and refuses to be named by others.
    return [(key, value) for key, value in metadata if key != "user-agent"]


def _returning(metadata: Any) -> list[tuple[str, Any]]:
    """Returns what the upstream said, without what gRPC says of the connection to it."""
    return [(key, value) for key, value in metadata or () if key == _DETAILS or not key.startswith("grpc-")]
