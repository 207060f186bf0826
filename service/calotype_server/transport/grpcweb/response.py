"""Frames to the client, and what to do with one who does not read."""

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
    """The client took nothing for too long. Nothing more can be told to it, the status least of all."""


class Response:
    """The answer to one call: headers once, then frames, then trailers, each written whole.

    Errors are always trailers in the body of a 200: a page of another origin need not be allowed to see headers, and
    what comes before the first message looks the same as what comes after it.

    Args:
        send: Of ASGI.
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
        """Sends the headers at once.

        Raises:
            grpc.aio.UsageError: They have been sent.
        """
        if self._started:
            raise grpc.aio.UsageError("Initial metadata has been sent already.")
        await self._send_headers(framing.encode_headers(metadata))
        # Some servers hold the headers back until there is a body.
        await self._send(b"", more=True)

    async def write(self, message: bytes) -> None:
        """Sends a message."""
        if self._closed:
            # The status is decided: a handler that swallowed its cancellation writes no more.
            raise asyncio.CancelledError
        if not self._started:
            await self._send_headers()
        await self._send(framing.encode_message(message, text=self._text), more=True)
        # A send that never waits must not keep the loop from noticing that the client has left.
        await asyncio.sleep(0)

    def close(self) -> None:
        """Lets no message follow."""
        self._closed = True

    async def finish(self, status: Status) -> None:
        """Sends the trailers; nothing may follow."""
        self.close()
        trailers = framing.encode_trailers(status, text=self._text)
        if not self._started:
            await self._send_headers([(b"content-length", str(len(trailers)).encode())])
        await self._send(trailers, more=False)

    async def _send_headers(self, further: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self._started = True
        kind = b"application/grpc-web-text+proto" if self._text else b"application/grpc-web+proto"
        headers = [
            (b"content-type", kind),
            (b"cache-control", b"no-store"),
            # nginx would collect the stream until it is over.
            (b"x-accel-buffering", b"no"),
            *further,
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
