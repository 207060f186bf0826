"""TLS handshakes of the web port, limited in time and in number like the connections that follow them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from calotype_server.transport.net.peers import peer_name

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from calotype_server.limits import PortLimits
    from calotype_server.transport.web.connections import Connection, Connections

__all__ = ["TlsHandshakes"]


class TlsHandshakes:
    """Creates the protocols of new connections, which switch to HTTP when their handshake is complete.

    asyncio alone would allow each handshake one minute, and uvicorn does not count connections before they complete it.

    Args:
        http: Creates the HTTP protocol of a connection from uvicorn's keyword arguments.
        context: For TLS.
        limits: Time for a handshake.
        connections: Counts the connections of the port.
    """

    def __init__(
        self,
        http: Callable[..., asyncio.Protocol],
        context: ssl.SSLContext,
        limits: PortLimits,
        connections: Connections,
    ) -> None:
        self._http = http
        self._context = context
        self._limits = limits
        self._connections = connections
        self._active: set[asyncio.Task[None]] = set()

    def __call__(self, **uvicorn_arguments: Any) -> asyncio.Protocol:
        """Returns the protocol of one connection; called by uvicorn."""
        return _BeforeHandshake(self, uvicorn_arguments)

    def start(self, transport: asyncio.Transport, uvicorn_arguments: dict[str, Any]) -> None:
        """Starts the handshake of a connection, or closes the connection if there are too many."""
        peer = transport.get_extra_info("peername") or ("", 0)
        connection = self._connections.open(peer_name(*peer[:2]), transport.abort)
        if connection is None:
            transport.abort()
            return
        # From now on, incoming bytes belong to the handshake.
        transport.pause_reading()
        task = asyncio.create_task(self._shake_hands(transport, connection, uvicorn_arguments))
        self._active.add(task)
        task.add_done_callback(self._active.discard)

    def close(self) -> None:
        """Cancels all active handshakes."""
        for task in self._active:
            task.cancel()

    async def _shake_hands(
        self, transport: asyncio.Transport, connection: Connection, uvicorn_arguments: dict[str, Any]
    ) -> None:
        early = _EarlyData()
        loop, seconds = asyncio.get_running_loop(), self._limits.request_seconds
        try:
            encrypted = await loop.start_tls(
                transport,
                early,
                self._context,
                server_side=True,
                ssl_handshake_timeout=seconds,
                # Otherwise a client could keep a closed connection open for half a minute.
                ssl_shutdown_timeout=seconds,
            )
        except OSError:
            # Not TLS, an untrusted certificate, a timeout or a disconnect; asyncio has closed the connection.
            encrypted = None
        if encrypted is None or early.lost:
            connection.closed()
            return
        protocol = self._http(connection=connection, **uvicorn_arguments)
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)
        for data in early.received:
            protocol.data_received(data)


class _EarlyData(asyncio.Protocol):
    """Holds bytes that arrive together with the end of the handshake, before `start_tls` returns."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.received.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


class _BeforeHandshake(asyncio.Protocol):
    """The protocol of a connection before its handshake."""

    def __init__(self, handshakes: TlsHandshakes, uvicorn_arguments: dict[str, Any]) -> None:
        self._handshakes = handshakes
        self._uvicorn_arguments = uvicorn_arguments

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._handshakes.start(transport, self._uvicorn_arguments)
