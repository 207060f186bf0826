"""The standalone bridge: browsers on one side, Calotype servers elsewhere on the other. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import structlog

from calotype_server.signals import Signals
from calotype_server.telemetry import configure_logging
from calotype_server.transport.forwarding import Forwarder
from calotype_server.transport.upstreams import Upstreams
from calotype_server.transport.web import WebServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.settings import BridgeSettings

__all__ = ["serve"]

_log = structlog.get_logger(__name__)


async def serve(settings: BridgeSettings, announce: Callable[[str, str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then lets running calls end; a second signal hurries.

    It starts whether or not there is any upstream, and finds each whenever it comes.

    Args:
        settings: What the operator wants.
        announce: Called once with the web address and the upstreams, when requests are welcome.

    Raises:
        StartupError: The address is taken.
    """
    configure_logging(settings.log_level, settings.log_format)
    signals = Signals()
    async with Upstreams(settings.upstream, _connect) as upstreams:
        web = WebServer(
            settings.web_address,
            lambda server: server.add_generic_rpc_handlers([Forwarder(upstreams)]),
            is_ready=upstreams.is_serving,
            allowed_origins=settings.allowed_origins,
            allowed_hosts=settings.allowed_hosts,
        )
        address = await web.start()
        try:
            announce(address, ", ".join(settings.upstream))
            await signals.stopping()
            _log.info("draining", grace=settings.drain_seconds)
            await signals.unless_hurried(web.stop(settings.drain_seconds))
        finally:
            await web.stop(0)


def _connect(target: str, options: Sequence[tuple[str, int | str]]) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(target, options)
