"""The composition root: settings in, a running server out, and an orderly end. The only module that knows them all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from calotype_server import __version__, errors, tracing
from calotype_server.admission import Admission
from calotype_server.api import Api
from calotype_server.budget import PreviewBudget
from calotype_server.encode import Encoder
from calotype_server.estimates import Pace
from calotype_server.generations import Generations
from calotype_server.metrics import ServerMetrics
from calotype_server.observations import Observe, to_all
from calotype_server.retention import Retention
from calotype_server.signals import Signals
from calotype_server.store import Store
from calotype_server.telemetry import configure_logging
from calotype_server.transport.descriptors import reserve_descriptors
from calotype_server.transport.doors import Doors
from calotype_server.transport.exposition import serve_metrics
from calotype_server.transport.native import NativeServer
from calotype_server.transport.peers import Peers
from calotype_server.transport.servicer import GenerationServicer
from calotype_server.transport.services import Services
from calotype_server.transport.web import WebServer
from calotype_server.types import PreviewMethod
from calotype_server.watchdog import Watchdog, end_when_stalled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.engine.protocol import Engine
    from calotype_server.generation import Generation
    from calotype_server.settings import Settings
    from calotype_server.types import ModelInfo
    from calotype_server.watchdog import Stall

__all__ = ["LOADING_THREAD", "Ready", "serve"]

LOADING_THREAD = "calotype-load"

_log = structlog.get_logger(__name__)

_LAST_WORDS_SECONDS = 2.0
"""For streams to deliver their end after everything has ended."""


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
    doors = Doors(settings, {"--grpc-address": settings.grpc_address, "--web-address": settings.web_address})
    api = Api(settings.limits)
    services = Services(GenerationServicer(api, doors.access))
    await services.set_serving(False)
    limits = settings.port_limits
    reserve_descriptors(2 * limits.max_connections)
    peers = Peers(limits.max_calls_per_peer)
    metrics = ServerMetrics(__version__)
    metrics.read(serving=lambda: services.serving)
    tracer = _tracing(settings)
    observe = metrics.observe if tracer is None else to_all(metrics.observe, tracer.observe)
    native = NativeServer(services, doors.access, doors.certificates, limits=limits, peers=peers, observe=observe)
    web = WebServer(
        settings.web_address,
        services.add_to,
        doors.access,
        doors.certificates,
        is_ready=services.is_serving,
        api=api,
        allowed_origins=settings.allowed_origins,
        allowed_hosts=settings.allowed_hosts,
        limits=limits,
        peers=peers,
        observe=observe,
        metrics=None if settings.metrics_address else metrics.render,
    )
    budget = PreviewBudget(settings.preview_budget)
    store = None if settings.state is None else await Store.open(settings.state.expanduser())
    address = await native.start(settings.grpc_address)
    opened = contextlib.AsyncExitStack()
    try:
        doors.watch()
        web_address = await web.start()
        await opened.enter_async_context(serve_metrics(settings.metrics_address, metrics.render))
        engine = await signals.unless_stopped(_in_daemon_thread(lambda: _load_engine(settings, budget, observe)))
        if engine is None:
            return 0
        metrics.describe(engine.model)
        encoder = Encoder(budget.observe_encode, observe)
        pace = Pace()
        max_active = engine.model.max_active
        admission = Admission(
            pace,
            max_active=max_active,
            max_queue=settings.max_queue,
            max_queue_per_caller=settings.max_queue_per_caller,
        )
        dead = asyncio.Event()
        ended: Retention[Generation] = Retention(
            seconds=settings.retain_seconds, count=settings.retain_count, size=settings.retain_bytes
        )
        generations = Generations(
            engine,
            admission,
            pace,
            encoder,
            ended,
            store,
            max_active=max_active,
            heartbeat=settings.heartbeat_seconds,
            on_dead=dead.set,
            observe=observe,
        )
        metrics.read(
            active=lambda: admission.active,
            queued=lambda: admission.waiting,
            readers=lambda: generations.readers,
            log_bytes=lambda: sum(generation.size for generation in generations.running),
            retained=lambda: len(ended),
            retained_bytes=lambda: ended.size,
        )
        try:
            await signals.unless_stopped(generations.warm_up())
        except errors.ServiceError as error:
            raise errors.ModelUnavailable(f"The model {settings.model!r} cannot make a picture: {error}") from error

        async def farewell(stalls: Sequence[Stall]) -> None:
            await services.set_serving(False)
            await generations.abandon([stall.generation for stall in stalls])
            await asyncio.gather(native.stop(_LAST_WORDS_SECONDS), web.stop(_LAST_WORDS_SECONDS))
            if store is not None:
                await store.close()

        if settings.watchdog_seconds:
            # From now on: what came before was done for the first time, and nobody can say how long that takes.
            watchdog = Watchdog(
                lambda: generations.running,
                lambda job: pace.usual_pause(job, admission.active),
                settings.watchdog_seconds,
            )
            metrics.read(longest_pause=lambda: watchdog.longest_pause)
            watching = asyncio.create_task(end_when_stalled(watchdog, farewell))
            opened.callback(watching.cancel)
        if not signals.stopped:
            await generations.restore()
            api.open(generations)
            await services.set_serving(True)
            announce(Ready(address, web_address, engine.model, time.monotonic() - begun))
            await signals.unless_stopped(dead.wait())
        _log.info("draining", grace=settings.drain_seconds)
        await services.set_serving(False)
        generations.refuse(retry_after=settings.drain_seconds + _LAST_WORDS_SECONDS)
        with contextlib.suppress(TimeoutError):
            await signals.unless_hurried(asyncio.wait_for(generations.idle(), settings.drain_seconds))
        await generations.end_all()
        services.release_watchers()
        await asyncio.gather(native.stop(_LAST_WORDS_SECONDS), web.stop(_LAST_WORDS_SECONDS))
        generations.close()
        encoder.close()
        engine.close()
        return 1 if dead.is_set() else 0
    finally:
        await doors.close()
        await asyncio.gather(native.stop(0), web.stop(0))
        await opened.aclose()
        if store is not None:
            await store.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


def _tracing(settings: Settings) -> tracing.Tracing | None:
    if settings.tracing is None and not tracing.wanted():
        return None
    return None if settings.tracing is False else tracing.configured(__version__, required=bool(settings.tracing))


def _load_engine(settings: Settings, budget: PreviewBudget, observe: Observe) -> Engine:
    # OpenMP's threads spin while they wait for each other. A server shares its cores, with its own event loop at least,
    # and spinning against it was measured to cost up to twenty times the time of a step. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Here, so that a wrong address or flag is told before torch has been imported for seconds.
    from calotype_server.engine import capabilities, diffusers, loading

    device = loading.pick_device(settings.device)
    pipeline = loading.load_pipeline(
        settings.model,
        revision=settings.revision,
        variant=settings.variant,
        device=device,
        dtype=loading.pick_dtype(settings.dtype, device),
    )
    try:
        given = capabilities.Defaults(settings.step_count, settings.guidance_scale, settings.tiny_vae)
        defaults = given.or_else(capabilities.read_defaults(loading.locate(settings.model)))
        tiny_vae = loading.load_tiny_vae(defaults.tiny_vae, like=pipeline.vae) if defaults.tiny_vae else None
        engine = diffusers.DiffusersEngine(
            loading.display_name(settings.model),
            pipeline,
            defaults=defaults,
            cache_dir=settings.cache_dir,
            threads=settings.threads,
            budget=budget,
            preview_methods=settings.allowed_methods,
            tiny_vae=tiny_vae,
            max_active=settings.max_active,
            max_rows=settings.max_batch_rows,
            deterministic=settings.deterministic,
            observe=observe,
        )
        _check_default_method(settings, engine.model)
        return engine
    except errors.StartupError:
        raise
    except Exception as error:
        _log.exception("the pipeline cannot be driven")
        kind = type(pipeline).__name__
        raise errors.ModelUnavailable(f"{settings.model!r} is a {kind}, which Calotype cannot drive.") from error


def _check_default_method(settings: Settings, model: ModelInfo) -> None:
    """Otherwise every request that leaves the method open would be refused."""
    method = settings.preview_method
    if method in (PreviewMethod.AUTO, PreviewMethod.NONE) or method in model.preview_methods:
        return
    others = ", ".join((PreviewMethod.AUTO, *model.preview_methods, PreviewMethod.NONE))
    hint = " Name one that fits the model with --tiny-vae, or" if method is PreviewMethod.TINY_VAE else " Please"
    raise errors.ModelUnavailable(
        f"--preview-method is {method}, by which no previews of {settings.model!r} can be drawn."
        f"{hint} choose another method: {others}."
    )


async def _in_daemon_thread(function: Callable[[], Engine]) -> Engine:
    """Loading cannot be interrupted; in a daemon thread it does not hold up an exit either."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Engine] = loop.create_future()

    def settle(setter: Callable[[object], None], value: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if result.done() else setter(value))

    def run() -> None:
        try:
            settle(result.set_result, function())  # type: ignore[arg-type]
        except BaseException as error:
            settle(result.set_exception, error)  # type: ignore[arg-type]

    threading.Thread(target=run, name=LOADING_THREAD, daemon=True).start()
    return await result
