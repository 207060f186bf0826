"""Runs uvicorn inside this process's event loop, with limits on connections and request heads.

It overrides undocumented parts of uvicorn. `tests/unit/transport/test_uvicorn_internals.py` checks that each exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any

import uvicorn

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.transport.net.proxies import NO_PROXIES, TrustedProxies
from calotype_server.transport.web.connections import Connections
from calotype_server.transport.web.http_protocol import HttpProtocol
from calotype_server.transport.web.sockets import listen
from calotype_server.transport.web.tls_handshake import TlsHandshakes
from calotype_server.transport.web.websocket_protocol import WebSocketProtocol

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Iterator

__all__ = ["UvicornServer"]

_STOP_GRACE_SECONDS = 2
"""Time for responses other than calls to complete when the server stops."""


class UvicornServer:
    """Serves an ASGI app on one address.

    Args:
        application: The app.
        limits: Connections, header sizes and timeouts.
        context: For TLS, or None for plaintext.
        option: The flag that sets the address, for error messages.
        proxies: Trusted proxies, which may hold more connections than other hosts.
    """

    def __init__(
        self,
        application: Any,
        limits: PortLimits = PORT_LIMITS,
        context: ssl.SSLContext | None = None,
        option: str = "--web-address",
        proxies: TrustedProxies = NO_PROXIES,
    ) -> None:
        self._option = option
        self._limits = limits
        connections = Connections(limits, proxies)
        plain = functools.partial(HttpProtocol, limits, connections)
        self._handshakes = None if context is None else TlsHandshakes(plain, context, limits, connections)
        protocol: Any = self._handshakes or plain
        self._server = _Server(
            uvicorn.Config(
                application,
                http=protocol,
                ws=WebSocketProtocol,
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
                # Callers could name any address: by default, uvicorn believes every proxy on this machine.
                proxy_headers=False,
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
