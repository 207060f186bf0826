"""`calotype serve`: opens the ports, loads the engine, serves, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog

from calotype_server.api.service import GenerationService
from calotype_server.apps.health import HealthReporter
from calotype_server.apps.instruments import Instruments
from calotype_server.apps.load_time import LoadTime
from calotype_server.apps.loading import load_engine
from calotype_server.apps.runtime import FINAL_MESSAGE_GRACE_SECONDS, Runtime
from calotype_server.apps.signals import Signals
from calotype_server.generations.store import Store
from calotype_server.generations.watchdog import EXIT_STALLED
from calotype_server.observability.logs import configure_logging
from calotype_server.transport.grpc.server import OPTION as GRPC_OPTION
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.servicer import GenerationServicer
from calotype_server.transport.grpc.services import Services
from calotype_server.transport.net.address import check_free
from calotype_server.transport.net.call_limits import CallLimiter
from calotype_server.transport.net.exposure import Exposure
from calotype_server.transport.net.open_files import raise_open_file_limit
from calotype_server.transport.net.proxies import TrustedProxies
from calotype_server.transport.web.metrics_endpoint import serve_metrics
from calotype_server.transport.web.probes import serve_probes
from calotype_server.transport.web.server import WebServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

    from calotype_server.engine.protocol import Engine
    from calotype_server.observability.events import Observe
    from calotype_server.settings import Settings
    from calotype_server.types import ModelInfo

__all__ = ["Ready", "serve"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """Describes a server that accepts requests. `load_seconds` is the time since `serve` was called."""

    address: str
    web_address: str
    model: ModelInfo
    load_seconds: float


async def serve(
    settings: Settings,
    announce: Callable[[Ready], None],
    load: Callable[[Settings, Observe], Coroutine[object, object, Engine]] = load_engine,
    exit_after: Callable[[float, int], None] | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the drain early.

    Args:
        settings: The operator's settings.
        announce: Called once, when the server accepts requests.
        load: Loads the engine.
        exit_after: Limits the time of the stop; see `Signals`.

    Returns:
        The exit code: 0 after a signal, 1 when the engine cannot continue, 70 when something hung during the stop. In
        the last case threads still run, and the process must end without joining them.

    Raises:
        StartupError: An address is in use, or the model, the state or a file cannot be used.
    """
    configure_logging(settings.log_level, settings.log_format, prompts=settings.log_prompts)
    load_time = LoadTime(settings.cache_dir, settings.model)
    signals = Signals(settings.handover_seconds + settings.drain_seconds, exit_after)
    exposure = Exposure(settings, {"--grpc-address": settings.grpc_address, "--web-address": settings.web_address})
    service = GenerationService(settings.limits, load_time.remaining)
    async with (
        Instruments(settings.tracing) as instruments,
        _Ports(settings, service, exposure, instruments) as ports,
        contextlib.AsyncExitStack() as state,
        contextlib.AsyncExitStack() as running,
    ):
        # After the ports: the probes get answers even if the disk hangs.
        opening = Store.opened(settings.state, settings.state_timeout_seconds)
        store = await signals.unless_stopped(state.enter_async_context(opening))
        engine = None if signals.stopped else await signals.unless_stopped(load(settings, instruments.observe))
        if engine is None:
            return 0
        runtime = Runtime(
            settings,
            engine,
            service=service,
            instruments=instruments,
            store=store,
            hurry=signals.hurry,
            on_stall=ports.end_stalled,
        )
        if await signals.unless_stopped(running.enter_async_context(runtime)) is None:
            return 0
        await ports.open()
        async with HealthReporter(runtime.problems, ports.set_serving).running():
            announce(Ready(ports.grpc_address, ports.web_address, engine.model, load_time.seconds))
            load_time.save()
            await signals.unless_stopped(runtime.dead.wait())
        if runtime.dead.is_set():
            signals.limit_stop(settings.drain_seconds)
        else:
            with contextlib.suppress(TimeoutError):
                await signals.unless_hurried(ports.hand_over(runtime.dead))
        await ports.drain()
        await running.aclose()
        await ports.stop(FINAL_MESSAGE_GRACE_SECONDS)
        if runtime.hangs:
            return EXIT_STALLED
        return 1 if runtime.dead.is_set() else 0


class _Ports:
    """The gRPC port, the web port and, if configured, those for probes and metrics.

    They are open during the `async with` block.

    Attributes:
        grpc_address: HOST:PORT of the gRPC port; "" until it is open.
        web_address: HOST:PORT of the web port.
    """

    web_address: str

    def __init__(
        self, settings: Settings, service: GenerationService, exposure: Exposure, instruments: Instruments
    ) -> None:
        limits, metrics, observe = settings.port_limits, instruments.metrics, instruments.observe
        call_limiter = CallLimiter(limits.max_calls_per_peer)
        proxies = TrustedProxies(settings.trusted_proxies)
        self._settings = settings
        self._exposure = exposure
        self._metrics = metrics
        self._services = services = Services(GenerationServicer(service, exposure.access, proxies))
        metrics.bind_gauges(serving=lambda: services.serving)
        self._native = NativeServer(
            services,
            exposure.access,
            exposure.certificates,
            limits=limits,
            call_limiter=call_limiter,
            observe=observe,
            proxies=proxies,
        )
        self._web = WebServer(
            settings.web_address,
            services.add_to,
            exposure.access,
            exposure.certificates,
            is_ready=services.is_serving,
            service=service,
            allowed_origins=settings.allowed_origins,
            allowed_hosts=settings.allowed_hosts,
            limits=limits,
            call_limiter=call_limiter,
            observe=observe,
            metrics=None if settings.metrics_address else metrics.render,
            proxies=proxies,
        )
        self.grpc_address = ""
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            raise_open_file_limit(2 * self._settings.port_limits.max_connections)
            await self.set_serving(False)
            stack.push_async_callback(self._native.stop, 0)
            if self._settings.handover_seconds:
                # gRPC's own clients would send calls to a server that is loading, and not retry them with another.
                check_free(self._settings.grpc_address, GRPC_OPTION)
            else:
                await self._open_native()
            self._exposure.watch_files()
            stack.push_async_callback(self._exposure.close)
            stack.push_async_callback(self._web.stop, 0)
            self.web_address = await self._web.start()
            await stack.enter_async_context(serve_probes(self._settings.probe_address, self._services.is_serving))
            await stack.enter_async_context(serve_metrics(self._settings.metrics_address, self._metrics.render))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def open(self) -> None:
        """Opens the gRPC port, unless it is open.

        Raises:
            AddressInUse: The address of the gRPC port is in use.
        """
        if not self.grpc_address:
            await self._open_native()

    async def set_serving(self, serving: bool) -> None:
        """Sets the result of health checks."""
        await self._services.set_serving(serving)

    async def _open_native(self) -> None:
        self.grpc_address = await self._native.start(self._settings.grpc_address)

    async def hand_over(self, dead: asyncio.Event) -> None:
        """Accepts the last calls while clients move to other servers, until `dead` is set.

        Raises:
            TimeoutError: The time is over.
        """
        seconds = self._settings.handover_seconds
        if not seconds:
            return
        _log.info("handing over", seconds=seconds)
        self._native.refuse_connections()
        self._web.drain()
        await asyncio.wait_for(dead.wait(), seconds)

    async def drain(self) -> None:
        """Asks clients to start new calls elsewhere. Active calls continue until `stop`."""
        await self._native.drain()
        self._web.drain()

    async def stop(self, grace: float) -> None:
        """Closes the ports; calls get `grace` seconds to deliver their last message."""
        self._services.release_watchers()
        await asyncio.gather(self._native.stop(grace), self._web.stop(grace))

    async def end_stalled(self, end_generations: Callable[[], Awaitable[None]]) -> None:
        """Fails health checks, ends all generations, and gives readers time to receive their last message."""
        await self.set_serving(False)
        await end_generations()
        await self.stop(FINAL_MESSAGE_GRACE_SECONDS)
