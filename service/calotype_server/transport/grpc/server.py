"""The grpc.aio port: options, reflection, and an orderly stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from grpc_reflection.v1alpha import reflection

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.grpc.interceptors import interceptors
from calotype_server.transport.grpc.request_guard import RequestGuard
from calotype_server.transport.net.address import check_free, in_use
from calotype_server.transport.net.call_limits import CallLimiter

if TYPE_CHECKING:
    from calotype_server.auth.access import Access
    from calotype_server.transport.grpc.services import Services
    from calotype_server.transport.net.certificates import Certificates

__all__ = ["NativeServer"]

_OPTION = "--grpc-address"


class NativeServer:
    """Serves native gRPC on one address, with reflection.

    Args:
        services: What to serve.
        access: Who may call.
        certificates: For TLS, or None for plaintext.
        limits: What a peer may take.
        peers: Counts the calls of all ports; None for a count of its own.
        observe: Told of calls and messages.
    """

    def __init__(
        self,
        services: Services,
        access: Access,
        certificates: Certificates | None = None,
        *,
        limits: PortLimits = PORT_LIMITS,
        peers: CallLimiter | None = None,
        observe: Observe = ignore,
    ) -> None:
        self._certificates = certificates
        intake = RequestGuard(peers or CallLimiter(limits.max_calls_per_peer), limits.request_seconds, observe)
        self._server = grpc.aio.server(
            interceptors=(intake, *interceptors(access, "native", observe)),
            options=_options(limits),
            # JPEG and PNG do not compress: gzip would only cost time.
            compression=grpc.Compression.NoCompression,
        )
        services.add_to(self._server)
        reflection.enable_server_reflection([*services.names, reflection.SERVICE_NAME], self._server)

    async def start(self, address: str) -> str:
        """Listens on HOST:PORT and returns it with the real port.

        Raises:
            AddressInUse: The address is taken or not one of this machine's.
        """
        check_free(address, _OPTION)
        try:
            if self._certificates is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError:
            await self._server.stop(None)
            raise in_use(address, _OPTION) from None
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def stop(self, grace: float) -> None:
        """Closes the port; calls under way get `grace` seconds to deliver their end."""
        await self._server.stop(grace)


def _options(limits: PortLimits) -> list[tuple[str, int]]:
    return [
        # A second server on the same port must fail, not share it.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        # A client keeps what exceeds this to itself, without a word; so it is more than a peer is allowed.
        ("grpc.max_concurrent_streams", 2 * limits.max_calls_per_peer),
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        ("grpc.max_send_message_length", 8 * 1024 * 1024),
        # The first is a threshold from which calls are refused by chance.
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.server_handshake_timeout_ms", _ms(limits.request_seconds)),
        # A vanished peer is noticed also while nothing is sent; the timeout is TCP_USER_TIMEOUT too.
        ("grpc.keepalive_time_ms", _ms(limits.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _ms(limits.keepalive_timeout_seconds)),
        # What a frozen process is given: the kernel acknowledges for it.
        ("grpc.http2.ping_timeout_ms", _ms(limits.keepalive_timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.max_connection_idle_ms", _ms(limits.idle_seconds)),
    ]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
