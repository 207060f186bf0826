"""Runs uvicorn inside this process's event loop, with limits on connections and request heads.

It overrides undocumented parts of uvicorn. `tests/unit/transport/test_uvicorn_internals.py` checks that each exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any

import uvicorn
from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.transport.web.sockets import listen
from calotype_server.transport.web.tls_handshake import TlsHandshakes

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Iterator

__all__ = ["UvicornServer"]

_HEAD_TOO_LARGE = "The request line and headers are too large."
_TOO_MANY_CONNECTIONS = b"The server has too many connections.\n"
_CONNECTION_REJECTION = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\nretry-after: 5\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_TOO_MANY_CONNECTIONS), _TOO_MANY_CONNECTIONS)
)

_STOP_GRACE_SECONDS = 2
"""Time for responses other than calls to complete when the server stops."""


class UvicornServer:
    """Serves an ASGI app on one address.

    Args:
        application: The app.
        limits: Connections, header sizes and timeouts.
        context: For TLS, or None for plaintext.
        option: The flag that sets the address, for error messages.
    """

    def __init__(
        self,
        application: Any,
        limits: PortLimits = PORT_LIMITS,
        context: ssl.SSLContext | None = None,
        option: str = "--web-address",
    ) -> None:
        self._option = option
        self._limits = limits
        plain = functools.partial(_Protocol, limits)
        self._handshakes = None if context is None else TlsHandshakes(plain, context, limits)
        protocol: Any = self._handshakes or plain
        self._server = _Server(
            uvicorn.Config(
                application,
                http=protocol,
                ws="websockets-sansio",
                ws_max_size=limits.max_request_bytes,
                # JPEG and PNG do not compress.
                ws_per_message_deflate=False,
                ws_ping_interval=limits.keepalive_seconds,
                ws_ping_timeout=limits.keepalive_timeout_seconds,
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=round(limits.idle_seconds),
                timeout_graceful_shutdown=_STOP_GRACE_SECONDS,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self, address: str) -> str:
        """Listens on HOST:PORT and returns it with the real port.

        Raises:
            AddressInUse: The address is in use, or does not belong to this machine.
        """
        sockets = listen(address, self._limits, self._option)
        self._serving = asyncio.create_task(self._server.serve(sockets))
        await self._server.ready.wait()
        return f"{address.rpartition(':')[0]}:{sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Closes the port and idle connections. Active responses have 2 seconds to complete."""
        if self._handshakes is not None:
            self._handshakes.close()
        if self._serving is not None:
            self._server.should_exit = True
            await asyncio.shield(self._serving)


class _Server(uvicorn.Server):
    """Sets `ready` when it listens, and leaves signal handling to the process."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(HttpToolsProtocol):
    """Adds to uvicorn's HTTP/1.1: limits on connections and request heads, and disconnects for pipelined requests.

    uvicorn reports a lost connection only to the newest request on it. It also stops reading, and so stops noticing
    disconnects, while another request is in the pipeline. A streaming response would then continue without a reader.
    """

    def __init__(self, limits: PortLimits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._active_cycle: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            transport.write(_CONNECTION_REJECTION)
            transport.close()
            return
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
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

    def on_headers_complete(self) -> None:
        if (
            len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            > self._limits.max_metadata_bytes
        ):
            # uvicorn answers this like any malformed head.
            raise HttpParserError(_HEAD_TOO_LARGE)
        self._head_bytes = 0
        self._stop_head_timer()
        super().on_headers_complete()
        if len(self.pipeline) == 1:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._active_cycle = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)
        if self._active_cycle is not None and not self._active_cycle.response_complete:
            self._active_cycle.disconnected = True
            self._active_cycle.message_event.set()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.request_seconds, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
