"""A server but for its ports: the engine, its generations, who observes them, and their orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING

import structlog

from calotype_server import __version__, errors
from calotype_server.api.service import Api
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.generations.admission import Admission
from calotype_server.generations.estimates import StepTimeEstimator
from calotype_server.generations.lifecycle import Generations
from calotype_server.generations.retention import Retention
from calotype_server.generations.store import Store
from calotype_server.generations.watchdog import Watchdog, end_when_stalled
from calotype_server.images.encoder import Encoder
from calotype_server.observability import tracing
from calotype_server.observability.events import Observe, to_all
from calotype_server.observability.metrics import ServerMetrics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from calotype_server.engine.protocol import Engine
    from calotype_server.generations.generation import Generation
    from calotype_server.generations.watchdog import Stall
    from calotype_server.settings import Settings
    from calotype_server.types import ModelInfo

__all__ = ["FINAL_MESSAGE_GRACE_SECONDS", "LOADING_THREAD", "Core"]

LOADING_THREAD = "calotype-load"

FINAL_MESSAGE_GRACE_SECONDS = 2.0
"""For streams to deliver their end after everything has ended."""

_log = structlog.get_logger(__name__)


class Core:
    """Call `load`, `warm_up`, `watch` and `open` in this order, then `drain`, and `close` in any case.

    Args:
        settings: What the operator wants.

    Attributes:
        api: Answers from the beginning, with `NotReady` until it is open.
        metrics: What there is to count.
        observe: Told what there is to see.
        dead: Set when the engine cannot go on.
        generations: What has been accepted, once the model is loaded.
    """

    generations: Generations

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.api = Api(settings.limits)
        self.metrics = ServerMetrics(__version__)
        self._tracer = _tracing(settings)
        counted = self.metrics.observe
        self.observe: Observe = counted if self._tracer is None else to_all(counted, self._tracer.observe)
        self.dead = asyncio.Event()
        self._budget = PreviewBudget(settings.preview_budget)
        self._encoder = Encoder(self._budget.observe_encode, self.observe)
        self._pace = StepTimeEstimator()
        self._engine: Engine | None = None
        self._store: Store | None = None
        self._watching: asyncio.Task[None] | None = None
        self._drained = False

    async def load(self) -> ModelInfo:
        """Loads the model, and describes it. Can be cancelled; the thread that loads then goes on for nobody.

        Raises:
            StartupError: The model or the state folder cannot be used.
        """
        settings = self._settings
        if settings.state is not None:
            self._store = await Store.open(settings.state.expanduser())
        engine = await _in_daemon_thread(lambda: _load_engine(settings, self._budget, self.observe))
        self._engine = engine
        self.metrics.describe(engine.model)
        max_active = engine.model.max_active
        self._admission = admission = Admission(
            self._pace,
            max_active=max_active,
            max_queue=settings.max_queue,
            max_queue_per_caller=settings.max_queue_per_caller,
        )
        ended: Retention[Generation] = Retention(
            seconds=settings.retain_seconds, count=settings.retain_count, size=settings.retain_bytes
        )
        self.generations = generations = Generations(
            engine,
            admission,
            self._pace,
            self._encoder,
            ended,
            self._store,
            max_active=max_active,
            heartbeat=settings.heartbeat_seconds,
            on_dead=self.dead.set,
            observe=self.observe,
        )
        self.metrics.read(
            active=lambda: admission.active,
            queued=lambda: admission.waiting,
            readers=lambda: generations.readers,
            log_bytes=lambda: sum(generation.size for generation in generations.running),
            retained=lambda: len(ended),
            retained_bytes=lambda: ended.size,
        )
        return engine.model

    async def warm_up(self) -> None:
        """Makes the first pictures.

        Raises:
            ModelUnavailable: The model cannot make any.
        """
        try:
            await self.generations.warm_up()
        except errors.ServiceError as error:
            model = self._settings.model
            raise errors.ModelUnavailable(f"The model {model!r} cannot make a picture: {error}") from error

    def watch(self, farewell: Callable[[Coroutine[object, object, None]], Awaitable[None]]) -> None:
        """Ends the process when the engine stalls from now on, where the operator wants that.

        What came before was done for the first time, and nobody can say how long that takes.

        Args:
            farewell: Is to await what it is given, which ends all generations, and to let readers hear of it.
        """
        if not self._settings.watchdog_seconds:
            return
        watchdog = Watchdog(
            lambda: self.generations.running,
            lambda job: self._pace.usual_pause(job, self._admission.active),
            self._settings.watchdog_seconds,
        )

        async def leave(stalls: Sequence[Stall]) -> None:
            await farewell(self.generations.abandon([stall.generation for stall in stalls]))
            if self._store is not None:
                await self._store.close()

        self.metrics.read(longest_pause=lambda: watchdog.longest_pause)
        self._watching = asyncio.create_task(end_when_stalled(watchdog, leave))

    async def open(self) -> None:
        """Takes up what the store has kept, and from now on requests."""
        await self.generations.restore()
        self.api.open(self.generations)

    async def drain(self, patiently: Callable[[Coroutine[object, object, None]], Awaitable[object]]) -> None:
        """Refuses what is new, and ends what is still there when `drain_seconds` have passed.

        Args:
            patiently: Waits for what it is given, but no longer than it has patience.
        """
        grace = self._settings.drain_seconds
        _log.info("draining", grace=grace)
        self.generations.refuse(retry_after=grace + FINAL_MESSAGE_GRACE_SECONDS)
        with contextlib.suppress(TimeoutError):
            await patiently(asyncio.wait_for(self.generations.idle(), grace))
        await self.generations.end_all()
        self._drained = True

    async def close(self) -> None:
        """Frees the state folder and, after a drain, the threads."""
        if self._watching is not None:
            self._watching.cancel()
        if self._drained and self._engine is not None:
            self.generations.close()
            self._encoder.close()
            self._engine.close()
        if self._store is not None:
            await self._store.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)


def _tracing(settings: Settings) -> tracing.Tracing | None:
    if settings.tracing is None and not tracing.wanted():
        return None
    return None if settings.tracing is False else tracing.configured(__version__, required=bool(settings.tracing))


def _load_engine(settings: Settings, budget: PreviewBudget, observe: Observe) -> Engine:
    from calotype_server.engine import factory

    return factory.load_engine(settings, budget, observe)


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
