"""The native gRPC port on grpc.aio, with reflection and a graceful stop.

A port stops in up to three stages, so that gRPC's own clients move to another server without a failed call:

1. `refuse_connections`: the port is closed, and connections renew elsewhere when they reach their maximum age
   (`options.server_options`). Until then, they accept calls. A connection ends with HTTP/2's GOAWAY in two steps, so
   that calls on their way are still accepted.
2. `drain`: the remaining connections get GOAWAY at once. gRPC cancels calls on their way, so without the first stage, a
   client can lose a call that it starts in that moment. Active calls continue.
3. `stop`: active calls get a grace period.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.grpc.interceptors import interceptors
from calotype_server.transport.grpc.listening import listening_on, refuse_connections
from calotype_server.transport.grpc.options import server_options
from calotype_server.transport.grpc.reflection import add_reflection
from calotype_server.transport.grpc.request_guard import RequestGuard
from calotype_server.transport.net.address import address_in_use, check_free
from calotype_server.transport.net.call_limits import CallLimiter
from calotype_server.transport.net.proxies import NO_PROXIES, TrustedProxies

if TYPE_CHECKING:
    from calotype_server.auth.access import Access
    from calotype_server.transport.grpc.services import Services
    from calotype_server.transport.net.certificates import Certificates

__all__ = ["OPTION", "NativeServer"]

OPTION = "--grpc-address"
"""The flag that sets the address, for error messages."""

_UNTIL_STOPPED_SECONDS = 1e8
"""Grace period of `drain`: longer than any drain. `stop` sets the real one."""


class NativeServer:
    """Serves native gRPC on one address, with reflection.

    Args:
        services: The services to offer.
        access: Checks keys.
        certificates: For TLS, or None for plaintext.
        limits: Limits per connection and per host.
        call_limiter: Counts the calls of a host on all ports; None to count those of this port only.
        observe: Receives events about calls and messages.
        proxies: Trusted proxies, whose calls count for the clients behind them.
    """

    def __init__(
        self,
        services: Services,
        access: Access,
        certificates: Certificates | None = None,
        *,
        limits: PortLimits = PORT_LIMITS,
        call_limiter: CallLimiter | None = None,
        observe: Observe = ignore,
        proxies: TrustedProxies = NO_PROXIES,
    ) -> None:
        self._certificates = certificates
        call_limiter = call_limiter or CallLimiter(limits.max_calls_per_peer)
        guard = RequestGuard(call_limiter, limits.request_seconds, proxies)
        self._server = grpc.aio.server(
            interceptors=interceptors(access, "native", observe, guard),
            options=server_options(limits),
            # JPEG and PNG do not compress: gzip would only cost time.
            compression=grpc.Compression.NoCompression,
        )
        services.add_to(self._server)
        add_reflection(services.names, self._server)
        self._listeners: frozenset[int] = frozenset()
        self._draining: asyncio.Task[None] | None = None

    async def start(self, address: str) -> str:
        """Listens on HOST:PORT and returns it with the real port.

        Raises:
            AddressInUse: The address is in use, or does not belong to this machine.
        """
        check_free(address, OPTION)
        requested = int(address.rpartition(":")[2])
        others = listening_on(requested) if requested else frozenset()
        try:
            if self._certificates is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError:
            await self._server.stop(None)
            raise address_in_use(address, OPTION) from None
        await self._server.start()
        self._listeners = listening_on(port) - others
        return f"{address.rpartition(':')[0]}:{port}"

    def refuse_connections(self) -> None:
        """Closes the port; open connections accept calls until they reach their maximum age."""
        refuse_connections(self._listeners)
        self._listeners = frozenset()

    async def drain(self) -> None:
        """Closes the port and asks clients to start new calls elsewhere; active calls continue until `stop`."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._server.stop(_UNTIL_STOPPED_SECONDS))
            # The task closes the port before it first waits.
            await asyncio.sleep(0)

    async def stop(self, grace: float) -> None:
        """Closes the port. Active calls have `grace` seconds to send their last message."""
        await self._server.stop(grace)
        if self._draining is not None:
            await self._draining
