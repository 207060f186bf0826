"""WebSocket connections: uvicorn's protocol with a timeout for the handshake, which closes when parsing fails.

It overrides undocumented parts of uvicorn. `tests/unit/transport/test_uvicorn_internals.py` checks that each exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    import asyncio

    from calotype_server.transport.web.connections import Connection

__all__ = ["WebSocketProtocol"]

_BAD_HANDSHAKE = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
    b"content-length: 29\r\n\r\nInvalid WebSocket handshake.\n"
)

_INVALID_DATA = 1007
"""The code with which a WebSocket is closed after text that is not UTF-8."""


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Closes the connection when a handshake is invalid or not complete in time, and logs no error of the client.

    websockets rejects some requests while it parses them, such as those with more than 128 headers. uvicorn does not
    notice, and would leave the connection open without any timer. It also logs a traceback for text that is not UTF-8,
    and makes the app fail that sends to a client which violates the protocol.
    """

    _connection: Connection | None = None
    _handshake_timer: asyncio.TimerHandle | None = None

    def adopt(self, connection: Connection, seconds: float) -> None:
        """Takes over a connection from HTTP.

        Args:
            connection: Counts this connection.
            seconds: Time for the handshake.
        """
        self._connection = connection
        self._handshake_timer = self.loop.call_later(seconds, self._end_handshake)

    def data_received(self, data: bytes) -> None:
        """Parses bytes, and closes the connection if the handshake is invalid."""
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            # websockets may have prepared a response, but none of its parts is a request that uvicorn would answer.
            self.transport.write(b"".join(self.conn.data_to_send()) or _BAD_HANDSHAKE)
            self.transport.close()

    def send_receive_event_to_app(self) -> None:
        """Passes a message on, and closes the connection if it is text but not UTF-8."""
        if self.curr_msg_data_type == "text" and not _is_utf8(b"".join(self.frames)):
            self.frames = []
            self.conn.fail(_INVALID_DATA, "Text must be UTF-8.")
            self.handle_parser_exception()
            return
        super().send_receive_event_to_app()

    async def send(self, message: Any) -> None:
        """Sends an event of the app.

        Raises:
            ClientDisconnected: The connection is closing.
        """
        if self.close_sent:
            raise ClientDisconnected
        await super().send(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the WebSocket."""
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
        if self._connection is not None:
            self._connection.closed()
        super().connection_lost(exc)

    def _end_handshake(self) -> None:
        if not self.handshake_complete:
            self.transport.abort()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
