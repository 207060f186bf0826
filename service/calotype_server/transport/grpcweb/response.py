"""Sends frames to a grpc-web client and detects stalled readers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from calotype_server.transport.grpcweb import framing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.transport.grpcweb.framing import Metadatum, Status

__all__ = ["Response", "Stalled"]


class Stalled(Exception):
    """The client read nothing for too long. Nothing more can be sent to it, not even a status."""


class Response:
    """The response to one call: headers once, then frames, then trailers. Each is written as a whole.

    Errors are always trailers in the body of an HTTP 200. Pages of other origins may not be allowed to read headers,
    and this way an error before the first message looks the same as one after it.

    Args:
        send: The ASGI send function.
        text: Whether to write base64.
        timeout: Seconds that the client may leave one frame unread.
    """

    def __init__(self, send: Any, *, text: bool, timeout: float) -> None:
        self._send_event = send
        self._text = text
        self._timeout = timeout
        self._started = False
        self._closed = False

    async def start(self, metadata: Sequence[Metadatum] = ()) -> None:
        """Sends the headers now.

        Raises:
            grpc.aio.UsageError: They were already sent.
            Stalled: The client does not read.
        """
        if self._started:
            raise grpc.aio.UsageError("Initial metadata has been sent already.")
        await self._send_headers(framing.encode_headers(metadata))
        # Some servers hold the headers back until the first piece of the body.
        await self._send(b"", more=True)

    async def write(self, message: bytes) -> None:
        """Sends a message.

        Raises:
            Stalled: The client does not read.
            asyncio.CancelledError: The status is already decided.
        """
        if self._closed:
            # Stops a handler that swallowed its cancellation.
            raise asyncio.CancelledError
        if not self._started:
            await self._send_headers()
        await self._send(framing.encode_message(message, text=self._text), more=True)
        # Lets the event loop notice a disconnect even if sending never has to wait.
        await asyncio.sleep(0)

    def close(self) -> None:
        """Prevents further messages."""
        self._closed = True

    async def finish(self, status: Status) -> None:
        """Sends the trailers, after which nothing may follow.

        Raises:
            Stalled: The client does not read.
        """
        self.close()
        trailers = framing.encode_trailers(status, text=self._text)
        if not self._started:
            await self._send_headers([(b"content-length", str(len(trailers)).encode())])
        await self._send(trailers, more=False)

    async def _send_headers(self, extra: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self._started = True
        content_type = b"application/grpc-web-text+proto" if self._text else b"application/grpc-web+proto"
        headers = [
            (b"content-type", content_type),
            (b"cache-control", b"no-store"),
            (b"grpc-accept-encoding", framing.ACCEPTED_ENCODING.encode()),
            # Otherwise nginx buffers the stream until it ends.
            (b"x-accel-buffering", b"no"),
            *extra,
        ]
        await self._send_in_time({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send(self, body: bytes, *, more: bool) -> None:
        await self._send_in_time({"type": "http.response.body", "body": body, "more_body": more})

    async def _send_in_time(self, event: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._send_event(event)
        except TimeoutError:
            raise Stalled from None
