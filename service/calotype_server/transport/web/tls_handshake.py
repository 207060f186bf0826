"""TLS handshakes of the web port: bounded in time and in number, as what follows them is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from calotype_server.limits import PortLimits

__all__ = ["Handshakes"]


class Handshakes:
    """Makes the protocols of new connections, which begin to speak HTTP when their handshake is done.

    asyncio alone would wait a minute for each, and uvicorn counts none before its end.

    Args:
        http: Makes the protocol that follows; called as by uvicorn.
        context: Of TLS.
        limits: What a peer may take.
    """

    def __init__(self, http: Callable[..., asyncio.Protocol], context: ssl.SSLContext, limits: PortLimits) -> None:
        self._http = http
        self._context = context
        self._limits = limits
        self._under_way: set[asyncio.Task[None]] = set()

    def __call__(self, **uvicorns: Any) -> asyncio.Protocol:
        """Returns the protocol of one connection."""
        return _Beginning(self, uvicorns)

    def begin(self, transport: asyncio.Transport, uvicorns: dict[str, Any]) -> None:
        """Begins the handshake on a connection, or closes it when there are too many."""
        if len(self._under_way) + len(uvicorns["server_state"].connections) >= self._limits.max_connections:
            transport.abort()
            return
        # What arrives from now on is the handshake's.
        transport.pause_reading()
        task = asyncio.create_task(self._shake(transport, uvicorns))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def close(self) -> None:
        """Ends those under way."""
        for task in self._under_way:
            task.cancel()

    async def _shake(self, transport: asyncio.Transport, uvicorns: dict[str, Any]) -> None:
        early = _Early()
        loop, seconds = asyncio.get_running_loop(), self._limits.request_seconds
        try:
            encrypted = await loop.start_tls(
                transport, early, self._context, server_side=True, ssl_handshake_timeout=seconds
            )
        except OSError:
            # No TLS, a certificate that is not ours to trust, too slow, or gone. It is closed.
            return
        if encrypted is None or early.gone:
            return
        protocol = self._http(**uvicorns)
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)
        for data in early.data:
            protocol.data_received(data)


class _Early(asyncio.Protocol):
    """Holds what comes with the end of a handshake, before it is known here that it has ended."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.gone = False

    def data_received(self, data: bytes) -> None:
        self.data.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True


class _Beginning(asyncio.Protocol):
    """What a connection is until its handshake."""

    def __init__(self, handshakes: Handshakes, uvicorns: dict[str, Any]) -> None:
        self._handshakes = handshakes
        self._uvicorns = uvicorns

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._handshakes.begin(transport, self._uvicorns)
