"""uvicorn inside this process's event loop: sockets that notice dead peers, limits on heads, an orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from calotype_server.transport.address import in_use, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Listener", "listen"]

_OPTION = "--web-address"

_SOCKET_OPTIONS = [
    # A peer that vanished while nothing is sent is noticed within 35 s, ...
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 20),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    # ... and one that acknowledges nothing, or whose window stays shut, within 20 s.
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 20_000),
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    # Bounds what the kernel holds for a reader who stalls.
    (socket.SOL_SOCKET, "SO_SNDBUF", 256 * 1024),
]

_HEAD_BYTES = 32 * 1024
"""Request line and headers together, at most."""

_TOO_LARGE = "The head of the request is too large."

_HEAD_SECONDS = 10.0
"""From the opening of a connection to the end of its first head."""

_MESSAGE_BYTES = 64 * 1024
"""Of a WebSocket's client, at most."""

_PING_SECONDS = 20.0
"""Between pings on a WebSocket, and for the answer to one."""

_KEEP_ALIVE_SECONDS = 75
_STATIC_SECONDS = 2
"""For answers that are not calls, when the server stops."""


class Listener:
    """Serves an ASGI app on one address.

    Args:
        application: The app.
    """

    def __init__(self, application: Any) -> None:
        self._server = _Server(
            uvicorn.Config(
                application,
                http=_Protocol,
                ws="websockets-sansio",
                ws_max_size=_MESSAGE_BYTES,
                # JPEG and PNG do not compress.
                ws_per_message_deflate=False,
                ws_ping_interval=_PING_SECONDS,
                ws_ping_timeout=_PING_SECONDS,
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_STATIC_SECONDS,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self, address: str) -> str:
        """Listens on HOST:PORT and returns it with the real port.

        Raises:
            AddressInUse: The address is taken or not one of this machine's.
        """
        sockets = listen(address)
        self._serving = asyncio.create_task(self._server.serve(sockets))
        await self._server.ready.wait()
        return f"{address.rpartition(':')[0]}:{sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Closes the port and idle connections; answers under way get two seconds."""
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
    """HTTP/1.1 with two things that uvicorn lacks: limits on a request's head, and disconnects for all requests.

    uvicorn tells a lost connection only to the newest request on it, and stops reading, and so noticing, when there is
    one in the pipeline. Then an answer that streams would go on for nobody.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._answered: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > _HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(_TOO_LARGE)

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > _HEAD_BYTES:
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

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def listen(address: str) -> list[socket.socket]:
    """Opens a socket for each address that HOST:PORT stands for, all with the same port.

    Raises:
        AddressInUse: One of them is taken, or not one of this machine's.
    """
    sockets: list[socket.socket] = []
    for family, target in resolve(address, _OPTION):
        port = sockets[0].getsockname()[1] if sockets else target[1]
        listening = socket.socket(family, socket.SOCK_STREAM)
        sockets.append(listening)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for level, name, value in _SOCKET_OPTIONS:
                # Accepted connections inherit them. Some systems lack some.
                if hasattr(socket, name):
                    listening.setsockopt(level, getattr(socket, name), value)
            listening.bind((target[0], port, *target[2:]))
            listening.setblocking(False)
        except OSError:
            for each in sockets:
                each.close()
            raise in_use(address, _OPTION) from None
    return sockets
