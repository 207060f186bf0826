"""The server as a process of its own: settings in, ports around the core, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype_server.apps.runtime import FINAL_MESSAGE_GRACE_SECONDS, Core
from calotype_server.apps.signals import Signals
from calotype_server.observability.logs import configure_logging
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.servicer import GenerationServicer
from calotype_server.transport.grpc.services import Services
from calotype_server.transport.net.call_limits import CallLimiter
from calotype_server.transport.net.exposure import Exposure
from calotype_server.transport.net.open_files import raise_open_file_limit
from calotype_server.transport.web.metrics_endpoint import serve_metrics
from calotype_server.transport.web.server import WebServer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from calotype_server.settings import Settings
    from calotype_server.types import ModelInfo

__all__ = ["Ready", "serve"]


@dataclass(frozen=True, slots=True)
class Ready:
    """What there is to tell when the server takes requests."""

    address: str
    web_address: str
    model: ModelInfo
    load_seconds: float


async def serve(settings: Settings, announce: Callable[[Ready], None]) -> int:
    """Serves until SIGTERM or SIGINT, then drains; a second signal hurries. Returns the exit code.

    Args:
        settings: What the operator wants.
        announce: Called once, when requests are welcome.

    Raises:
        StartupError: An address is taken, or the model cannot be used.
    """
    configure_logging(settings.log_level, settings.log_format, prompts=settings.log_prompts)
    begun = time.monotonic()
    signals = Signals()
    exposure = Exposure(settings, {"--grpc-address": settings.grpc_address, "--web-address": settings.web_address})
    core = Core(settings)
    services = Services(GenerationServicer(core.api, exposure.access))
    await services.set_serving(False)
    limits = settings.port_limits
    raise_open_file_limit(2 * limits.max_connections)
    call_limiter = CallLimiter(limits.max_calls_per_peer)
    metrics, observe = core.metrics, core.observe
    metrics.read(serving=lambda: services.serving)
    native = NativeServer(
        services, exposure.access, exposure.certificates, limits=limits, call_limiter=call_limiter, observe=observe
    )
    web = WebServer(
        settings.web_address,
        services.add_to,
        exposure.access,
        exposure.certificates,
        is_ready=services.is_serving,
        api=core.api,
        allowed_origins=settings.allowed_origins,
        allowed_hosts=settings.allowed_hosts,
        limits=limits,
        call_limiter=call_limiter,
        observe=observe,
        metrics=None if settings.metrics_address else metrics.render,
    )
    address = await native.start(settings.grpc_address)
    opened = contextlib.AsyncExitStack()
    try:
        exposure.watch_files()
        web_address = await web.start()
        await opened.enter_async_context(serve_metrics(settings.metrics_address, metrics.render))
        model = await signals.unless_stopped(core.load())
        if model is None:
            return 0
        await signals.unless_stopped(core.warm_up())

        async def farewell(ending: Coroutine[object, object, None]) -> None:
            await services.set_serving(False)
            await ending
            await asyncio.gather(native.stop(FINAL_MESSAGE_GRACE_SECONDS), web.stop(FINAL_MESSAGE_GRACE_SECONDS))

        core.watch(farewell)
        if not signals.stopped:
            await core.open()
            await services.set_serving(True)
            announce(Ready(address, web_address, model, time.monotonic() - begun))
            await signals.unless_stopped(core.dead.wait())
        await services.set_serving(False)
        await core.drain(signals.unless_hurried)
        services.release_watchers()
        await asyncio.gather(native.stop(FINAL_MESSAGE_GRACE_SECONDS), web.stop(FINAL_MESSAGE_GRACE_SECONDS))
        return 1 if core.dead.is_set() else 0
    finally:
        await exposure.close()
        await asyncio.gather(native.stop(0), web.stop(0))
        await opened.aclose()
        await core.close()
