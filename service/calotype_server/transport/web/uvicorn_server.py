"""uvicorn inside this process's event loop: sockets that notice dead peers, limits on heads, an orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.transport.net.address import in_use, resolve
from calotype_server.transport.web.tls_handshake import Handshakes

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

__all__ = ["UvicornServer", "listen"]

_TOO_LARGE = "The head of the request is too large."
_TOO_MANY = b"The server has as many connections as it takes.\n"
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\nretry-after: 5\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_TOO_MANY), _TOO_MANY)
)

_STATIC_SECONDS = 2
"""For answers that are not calls, when the server stops."""


class UvicornServer:
    """Serves an ASGI app on one address.

    Args:
        application: The app.
        limits: What a peer may take.
        context: For TLS, or None for plaintext.
        option: The flag that sets the address, for errors.
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
        self._handshakes = None if context is None else Handshakes(plain, context, limits)
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
                timeout_graceful_shutdown=_STATIC_SECONDS,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self, address: str) -> str:
        """Listens on HOST:PORT and returns it with the real port.

        Raises:
            AddressInUse: The address is taken or not one of this machine's.
        """
        sockets = listen(address, self._limits, self._option)
        self._serving = asyncio.create_task(self._server.serve(sockets))
        await self._server.ready.wait()
        return f"{address.rpartition(':')[0]}:{sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Closes the port and idle connections; answers under way get two seconds."""
        if self._handshakes is not None:
            self._handshakes.close()
        if self._serving is not None:
            self._server.should_exit = True
            await asyncio.shield(self._serving)


class _Server(uvicorn.Server):
    """Tells when it listens, and leaves signals to the process."""

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
    """HTTP/1.1 with what uvicorn lacks: limits on connections and on heads, and disconnects for all requests.

    uvicorn tells a lost connection only to the newest request on it, and stops reading, and so noticing, when there is
    one in the pipeline. Then an answer that streams would go on for nobody.
    """

    def __init__(self, limits: PortLimits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._answered: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            transport.write(_REFUSAL)
            transport.close()
            return
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            # The second: it has become a WebSocket.
            return
        if self._head_bytes > self._limits.max_metadata_bytes:
            self.send_400_response(_TOO_LARGE)
        elif self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            # A piece of the next head, or of a body that was answered before it was there.
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        if (
            len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            > self._limits.max_metadata_bytes
        ):
            # Answered as any head that is not HTTP.
            raise HttpParserError(_TOO_LARGE)
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
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.request_seconds, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def listen(address: str, limits: PortLimits = PORT_LIMITS, option: str = "--web-address") -> list[socket.socket]:
    """Opens a socket for each address that HOST:PORT stands for, all with the same port.

    Raises:
        AddressInUse: One of them is taken, or not one of this machine's.
    """
    sockets: list[socket.socket] = []
    for family, target in resolve(address, option):
        port = sockets[0].getsockname()[1] if sockets else target[1]
        listening = socket.socket(family, socket.SOCK_STREAM)
        sockets.append(listening)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for level, name, value in _socket_options(limits):
                # Accepted connections inherit them. Some systems lack some.
                if hasattr(socket, name):
                    listening.setsockopt(level, getattr(socket, name), value)
            listening.bind((target[0], port, *target[2:]))
            listening.setblocking(False)
        except OSError:
            for each in sockets:
                each.close()
            raise in_use(address, option) from None
    return sockets


def _socket_options(limits: PortLimits) -> list[tuple[int, str, int]]:
    noticed = limits.keepalive_seconds + limits.keepalive_timeout_seconds
    return [
        # A peer that vanished while nothing is sent is noticed after two questions without an answer, ...
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", math.ceil(limits.keepalive_seconds)),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", math.ceil(limits.keepalive_timeout_seconds / 2)),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 2),
        # ... and one that acknowledges nothing, or whose window stays shut, after this. It bounds the former, too.
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", math.ceil(1000 * min(limits.stall_seconds, noticed))),
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        # Bounds what the kernel holds for a reader who stalls.
        (socket.SOL_SOCKET, "SO_SNDBUF", 256 * 1024),
    ]
