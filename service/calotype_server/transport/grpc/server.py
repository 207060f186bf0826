"""The native gRPC port on grpc.aio, with reflection and a graceful stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from grpc_reflection.v1alpha import reflection

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.grpc.interceptors import interceptors
from calotype_server.transport.grpc.options import server_options
from calotype_server.transport.grpc.request_guard import RequestGuard
from calotype_server.transport.net.address import address_in_use, check_free
from calotype_server.transport.net.call_limits import CallLimiter
from calotype_server.transport.net.proxies import NO_PROXIES, TrustedProxies

if TYPE_CHECKING:
    from calotype_server.auth.access import Access
    from calotype_server.transport.grpc.services import Services
    from calotype_server.transport.net.certificates import Certificates

__all__ = ["NativeServer"]

_OPTION = "--grpc-address"


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
        reflection.enable_server_reflection([*services.names, reflection.SERVICE_NAME], self._server)

    async def start(self, address: str) -> str:
        """Listens on HOST:PORT and returns it with the real port.

        Raises:
            AddressInUse: The address is in use, or does not belong to this machine.
        """
        check_free(address, _OPTION)
        try:
            if self._certificates is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError:
            await self._server.stop(None)
            raise address_in_use(address, _OPTION) from None
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def stop(self, grace: float) -> None:
        """Closes the port. Active calls have `grace` seconds to send their last message."""
        await self._server.stop(grace)
