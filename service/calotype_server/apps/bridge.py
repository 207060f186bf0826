"""`calotype bridge`: the web port alone, in front of Calotype servers on other machines. Needs no torch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import structlog

from calotype_server import __version__
from calotype_server.apps.signals import Signals
from calotype_server.observability.logs import configure_logging
from calotype_server.observability.metrics import Metrics
from calotype_server.transport.cluster.forwarder import Forwarder
from calotype_server.transport.cluster.upstreams import Upstreams
from calotype_server.transport.net.certificates import upstream_credentials
from calotype_server.transport.net.exposure import Exposure
from calotype_server.transport.net.open_files import raise_open_file_limit
from calotype_server.transport.net.proxies import TrustedProxies
from calotype_server.transport.web.metrics_endpoint import serve_metrics
from calotype_server.transport.web.probes import serve_probes
from calotype_server.transport.web.server import WebServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.settings import BridgeSettings
    from calotype_server.transport.cluster.upstream import Connect

__all__ = ["serve"]

_log = structlog.get_logger(__name__)


async def serve(
    settings: BridgeSettings,
    announce: Callable[[str], None],
    exit_after: Callable[[float, int], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets running calls end; a second signal ends them.

    The bridge starts without its upstreams, and finds each one when it becomes available.

    Args:
        settings: The operator's settings.
        announce: Called once with the web address, when the bridge accepts requests.
        exit_after: Limits the time of the stop; see `Signals`.

    Raises:
        StartupError: The address is in use or exposed without protection, or a file cannot be used.
    """
    configure_logging(settings.log_level, settings.log_format)
    exposure = Exposure(settings, {"--web-address": settings.web_address})
    signals = Signals(settings.handover_seconds + settings.drain_seconds, exit_after)
    metrics = Metrics(__version__)
    raise_open_file_limit(settings.max_connections)

    async def is_ready() -> bool:
        return not signals.stopped and await upstreams.is_serving()

    async with Upstreams(settings.upstream, _connector(settings)) as upstreams:
        web = WebServer(
            settings.web_address,
            lambda server: server.add_generic_rpc_handlers([Forwarder(upstreams)]),
            exposure.access,
            exposure.certificates,
            is_ready=is_ready,
            allowed_origins=settings.allowed_origins,
            allowed_hosts=settings.allowed_hosts,
            limits=settings.port_limits,
            transport="bridge",
            observe=metrics.observe,
            metrics=None if settings.metrics_address else metrics.render,
            proxies=TrustedProxies(settings.trusted_proxies),
        )
        address = await web.start()
        try:
            exposure.watch_files()
            async with (
                serve_probes(settings.probe_address, is_ready),
                serve_metrics(settings.metrics_address, metrics.render),
            ):
                announce(address)
                await signals.stopping()
                web.drain()
                await signals.unless_hurried(asyncio.sleep(settings.handover_seconds))
                _log.info("draining", grace=settings.drain_seconds)
                await signals.unless_hurried(web.stop(settings.drain_seconds))
        finally:
            await exposure.close()
            await web.stop(0)


def _connector(settings: BridgeSettings) -> Connect:
    """Returns a function that opens a channel to an upstream."""
    if not settings.encrypts_upstream:
        return lambda target, options: grpc.aio.insecure_channel(target, options)
    credentials = upstream_credentials(settings.upstream_ca, settings.upstream_certificate, settings.upstream_key)
    return lambda target, options: grpc.aio.secure_channel(target, credentials, options)
