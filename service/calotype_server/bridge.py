"""The standalone bridge: browsers on one side, a Calotype server elsewhere on the other. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calotype_server.signals import Signals
from calotype_server.telemetry import configure_logging
from calotype_server.transport.certificates import upstream_credentials
from calotype_server.transport.descriptors import reserve_descriptors
from calotype_server.transport.doors import Doors
from calotype_server.transport.forwarding import CHANNEL_OPTIONS, Forwarder
from calotype_server.transport.web import WebServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.settings import BridgeSettings

__all__ = ["serve"]

_log = structlog.get_logger(__name__)

_HEALTH_SECONDS = 2.0
"""For the upstream to say whether it is well."""


async def serve(settings: BridgeSettings, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then lets running calls end; a second signal hurries.

    It starts whether or not the upstream is there, and finds it whenever it comes.

    Args:
        settings: What the operator wants.
        announce: Called once with the web address, when requests are welcome.

    Raises:
        StartupError: The address is taken, strangers could reach it, or a file cannot be used.
    """
    configure_logging(settings.log_level, settings.log_format)
    doors = Doors(settings, {"--web-address": settings.web_address})
    signals = Signals()
    reserve_descriptors(settings.max_connections)

    async def is_ready() -> bool:
        return not signals.stopped and await _is_serving(channel)

    async with _channel(settings) as channel:
        web = WebServer(
            settings.web_address,
            lambda server: server.add_generic_rpc_handlers([Forwarder(channel)]),
            doors.access,
            doors.certificates,
            is_ready=is_ready,
            allowed_origins=settings.allowed_origins,
            allowed_hosts=settings.allowed_hosts,
            limits=settings.port_limits,
        )
        address = await web.start()
        try:
            doors.watch()
            announce(address)
            await signals.stopping()
            _log.info("draining", grace=settings.drain_seconds)
            await signals.unless_hurried(web.stop(settings.drain_seconds))
        finally:
            await doors.close()
            await web.stop(0)


def _channel(settings: BridgeSettings) -> grpc.aio.Channel:
    if not settings.encrypts_upstream:
        return grpc.aio.insecure_channel(settings.upstream, options=CHANNEL_OPTIONS)
    credentials = upstream_credentials(settings.upstream_ca, settings.upstream_certificate, settings.upstream_key)
    return grpc.aio.secure_channel(settings.upstream, credentials, options=CHANNEL_OPTIONS)


async def _is_serving(channel: grpc.aio.Channel) -> bool:
    check: Any = health_pb2_grpc.HealthStub(channel).Check
    try:
        answer = await check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
