"""HTTP/1.1 connections: uvicorn's protocol with limits on connections, request heads and trailers.

It overrides undocumented parts of uvicorn. `tests/unit/transport/test_uvicorn_internals.py` checks that each exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from calotype_server.transport.net.peers import peer_name
from calotype_server.transport.web.websocket_protocol import WebSocketProtocol

if TYPE_CHECKING:
    import asyncio

    from calotype_server.limits import PortLimits
    from calotype_server.transport.web.connections import Connection, Connections

__all__ = ["HttpProtocol"]

_HEAD_TOO_LARGE = "The request line and headers are too large."
_TOO_MANY_CONNECTIONS = b"The server has too many connections.\n"
_CONNECTION_REJECTION = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\nretry-after: 5\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_TOO_MANY_CONNECTIONS), _TOO_MANY_CONNECTIONS)
)


class HttpProtocol(HttpToolsProtocol):
    """Adds limits on connections and request heads, ignores trailers, and disconnects pipelined requests.

    uvicorn appends the trailers of a chunked body to the headers, where they could pass for a key or an address. It
    reports a lost connection only to the newest request on it. It also stops reading, and so stops noticing
    disconnects, while another request is in the pipeline. A streaming response would then continue without a reader.

    Args:
        limits: Sizes and timeouts.
        connections: Counts the connections of the port.
        connection: This connection, if it is already counted; None to count it when it is made.
        arguments: Those of uvicorn's protocol.
    """

    def __init__(
        self, limits: PortLimits, connections: Connections, *, connection: Connection | None = None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._connections = connections
        self._connection = connection
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._active_cycle: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts the connection, or rejects it; then waits for a request."""
        super().connection_made(transport)
        if self._connection is None:
            self._connection = self._connections.open(peer_name(*(self.client or ("", 0))), transport.abort)
        if self._connection is None:
            transport.write(_CONNECTION_REJECTION)
            transport.close()
            return
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Parses bytes, and limits heads in size and time."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            # Either the connection closes, or it has become a WebSocket, which has its own protocol.
            return
        if self._head_bytes > self._limits.max_metadata_bytes:
            self.send_400_response(_HEAD_TOO_LARGE)
        elif self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            # The next head has started, or the rest of a body that was answered before it arrived.
            self._start_head_timer()

    def handle_websocket_upgrade(self) -> None:
        """Hands the connection over to the WebSocket protocol."""
        super().handle_websocket_upgrade()
        protocol = self.transport.get_protocol()
        assert isinstance(protocol, WebSocketProtocol)
        assert self._connection is not None
        protocol.adopt(self._connection, self._limits.request_seconds)

    def on_message_begin(self) -> None:
        """Starts a request."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Adds a header; ignores trailers."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Starts the request if its head is not too large."""
        if (
            len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            > self._limits.max_metadata_bytes
        ):
            # uvicorn answers this like any malformed head.
            raise HttpParserError(_HEAD_TOO_LARGE)
        self._in_head = False
        self._head_bytes = 0
        self._stop_head_timer()
        if self._connection is not None:
            self._connection.set_busy()
        super().on_headers_complete()
        if len(self.pipeline) == 1:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """Adds to the body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends the body."""
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Starts the next request, or waits for one."""
        if self._connection is not None and not self.pipeline:
            self._connection.set_idle()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Disconnects the active request, too."""
        self._stop_head_timer()
        if self._connection is not None:
            self._connection.closed()
        super().connection_lost(exc)
        if self._active_cycle is not None and not self._active_cycle.response_complete:
            self._active_cycle.disconnected = True
            self._active_cycle.message_event.set()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._active_cycle = cycle
        super()._start_asgi_task(cycle, app)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.request_seconds, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
