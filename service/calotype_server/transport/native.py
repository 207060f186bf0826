"""The grpc.aio port: options, health, reflection, and an orderly stop."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import add_GenerationServiceServicer_to_server
from calotype_server.errors import AddressInUse
from calotype_server.transport.interceptors import CallInterceptor

if TYPE_CHECKING:
    from calotype_server.transport.servicer import GenerationServicer

__all__ = ["NativeServer", "check_free"]

_SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

_OPTIONS = [
    # A second server on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 256),
    # Requests are prompts.
    ("grpc.max_receive_message_length", 64 * 1024),
    ("grpc.max_send_message_length", 8 * 1024 * 1024),
    ("grpc.max_metadata_size", 16 * 1024),
    # A vanished peer is noticed within 30 s also while nothing is sent; the timeout is TCP_USER_TIMEOUT too.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 5),
    ("grpc.max_connection_idle_ms", 600_000),
]


class NativeServer:
    """Serves native gRPC on one address, with health per service and reflection.

    Args:
        servicer: Answers the calls.
    """

    def __init__(self, servicer: GenerationServicer) -> None:
        # JPEG and PNG do not compress: gzip would only cost time.
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor()], options=_OPTIONS, compression=grpc.Compression.NoCompression
        )
        self._health = health.aio.HealthServicer()
        add_GenerationServiceServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)

    async def start(self, address: str) -> str:
        """Listens on HOST:PORT and returns it with the real port; health says NOT_SERVING until `set_serving`.

        Raises:
            AddressInUse: The address is taken or not one of this machine's.
        """
        await self.set_serving(False)
        check_free(address)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            await self._server.stop(None)
            raise _in_use(address) from None
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def set_serving(self, serving: bool) -> None:
        """Tells health checks, of the service and of the whole server, whether calls are welcome."""
        response = health_pb2.HealthCheckResponse
        for service in (_SERVICE, ""):
            await self._health.set(service, response.SERVING if serving else response.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Closes the port; calls under way get `grace` seconds to deliver their end."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


def check_free(address: str) -> None:
    """Raises `AddressInUse` unless every address that HOST:PORT stands for is free.

    A name such as localhost stands for several, and gRPC is content when it gets one of them.
    """
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise _in_use(address) from None
    for family, kind, protocol, _, target in found if int(port) else ():
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(target)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise _in_use(address) from None


def _in_use(address: str) -> AddressInUse:
    return AddressInUse(
        f"Cannot listen on {address}: it is in use, or not an address of this machine. Stop the other server, "
        "or choose another address with --grpc-address HOST:PORT (port 0 picks a free one)."
    )
