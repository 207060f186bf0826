"""Everything in a server except its ports: an engine, its generations, and their orderly shutdown."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

import structlog

from calotype_server import errors, threads
from calotype_server.generations.admission import Admission
from calotype_server.generations.estimates import StepTimeEstimator
from calotype_server.generations.index import GenerationIndex
from calotype_server.generations.lifecycle import Generations
from calotype_server.generations.retention import RetentionLimits
from calotype_server.generations.runner import Runner
from calotype_server.generations.watchdog import Watchdog, end_when_stalled
from calotype_server.images.encoder import Encoder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType

    from calotype_server.api.service import GenerationService
    from calotype_server.apps.instruments import Instruments
    from calotype_server.engine.protocol import Engine
    from calotype_server.generations.store import Store
    from calotype_server.generations.watchdog import Stall
    from calotype_server.settings import Settings

__all__ = ["FINAL_MESSAGE_GRACE_SECONDS", "Runtime"]

FINAL_MESSAGE_GRACE_SECONDS = 2.0
"""Time for streams to deliver their last message after every generation has ended."""

_JOIN_SECONDS = 3.0
"""Longest time to wait for the threads of engine and encoder after every generation has ended."""

_PROBE_SECONDS = 5.0

_log = structlog.get_logger(__name__)


class Runtime:
    """Runs the generations of one engine for the duration of an `async with` block.

    Usage::

        async with Runtime(settings, engine, service=service, instruments=instruments) as runtime:
            await runtime.dead.wait()

    Entering warms up the engine, starts the watchdog, restores stored generations and opens the service. Leaving
    drains: new work is rejected, running generations get `settings.drain_seconds` to end, the rest is aborted, and the
    engine is closed. The service still answers requests for ended generations afterwards.

    Args:
        settings: The operator's settings.
        engine: A loaded engine. The runtime closes it.
        service: Answers requests with `NotReady` until the block is entered.
        instruments: Counts and traces.
        store: Keeps generations across restarts, or None.
        hurry: Setting this event ends a drain early.
        on_stall: Called when a generation hangs, just before the process exits. Must await the function that it
            receives, which ends all generations, and then give readers time to receive their last message.
        warm_up: Whether to generate two small images first.

    Attributes:
        dead: Set when the engine or the encoder cannot continue: only a new process helps.
        admission: The queue.
        generations: All generations.

    Raises:
        ModelUnavailable: The model cannot generate an image.
        StateUnusable: The stored generations cannot be read.
    """

    admission: Admission
    generations: Generations

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        *,
        service: GenerationService,
        instruments: Instruments,
        store: Store | None = None,
        hurry: asyncio.Event | None = None,
        on_stall: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]] | None = None,
        warm_up: bool = True,
    ) -> None:
        self.dead = asyncio.Event()
        self._left_behind = False
        self._settings = settings
        self._engine = engine
        self._service = service
        self._instruments = instruments
        self._store = store
        self._hurry = hurry or asyncio.Event()
        self._on_stall = on_stall
        self._warm_up = warm_up
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await self._enter(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _enter(self, stack: contextlib.AsyncExitStack) -> None:
        """Starts everything, and registers on `stack` how each part ends, in reverse order."""
        settings, engine = self._settings, self._engine
        stack.enter_context(threads.short_turns())
        estimator = StepTimeEstimator()
        self.admission = Admission(
            estimator,
            max_active=engine.model.max_active,
            max_progressing=engine.model.max_progressing,
            max_queue=settings.max_queue,
            max_queue_per_caller=settings.max_queue_per_caller,
            shared=settings.checks_keys,
            memory=engine.model.memory,
            spare=engine.model.width * engine.model.height,
        )
        self._encoder = encoder = Encoder(
            engine.note_preview_encoding,
            self._instruments.observe,
            seconds=settings.encode_timeout_seconds,
            on_exhausted=self._encoder_exhausted,
        )
        runner = Runner(engine, self.admission, estimator, encoder)
        stack.push_async_callback(self._close_threads, runner.close, encoder.close, engine.close)
        limits = RetentionLimits(settings.retain_seconds, settings.retain_count, settings.retain_bytes)
        self.generations = Generations(
            runner,
            self.admission,
            GenerationIndex(limits, self._store),
            heartbeat_seconds=settings.heartbeat_seconds,
            on_dead=self.dead.set,
            observe=self._instruments.observe,
        )
        stack.callback(self.generations.close)
        self._report_metrics()
        if self._store is not None:
            probing = asyncio.create_task(self._probe(self._store), name="probe")
            stack.callback(probing.cancel)
        if settings.watchdog_seconds:
            watching = asyncio.create_task(self._watch(runner, estimator))
            stack.callback(watching.cancel)
        if self._warm_up:
            await self._warm_up_engine(runner)
        stack.push_async_callback(self._drain)
        await self.generations.restore(settings.limits)
        self._service.open(self.generations)

    def problems(self) -> list[str]:
        """Returns why the server cannot do its work now: parts that hang or fail. Empty if there is no reason."""
        found = [self._encoder.problem, None if self._store is None else self._store.problem]
        return [each for each in found if each is not None]

    @property
    def hangs(self) -> bool:
        """Whether a thread or the disk does not respond, or was left behind because it did not."""
        return self._left_behind or bool(self._encoder.hung) or (self._store is not None and self._store.hangs)

    def _encoder_exhausted(self) -> None:
        _log.error("too many encoder threads hang; the server stops, and a supervisor should restart it")
        self.dead.set()

    async def _close_threads(self, *closes: Callable[[], None]) -> None:
        """Stops the threads of all parts, and leaves behind those that do not end in time."""

        def close() -> None:
            for each in closes:
                try:
                    each()
                except Exception:
                    _log.exception("a part did not close")

        closing = asyncio.ensure_future(threads.run("close", close))
        await asyncio.wait({closing}, timeout=_JOIN_SECONDS)
        if not closing.done():
            closing.cancel()
            self._left_behind = True
            _log.error("threads still work and are left behind", stacks=threads.stacks())

    async def _probe(self, store: Store) -> None:
        """Notices a disk that hangs even if there is nothing to store."""
        while True:
            await asyncio.sleep(_PROBE_SECONDS)
            with contextlib.suppress(errors.StateUnavailable):
                await store.touch()

    async def _warm_up_engine(self, runner: Runner) -> None:
        try:
            await runner.warm_up()
        except errors.ServiceError as error:
            name = self._settings.model
            raise errors.ModelUnavailable(f"The model {name!r} cannot generate an image: {error}") from error

    def _report_metrics(self) -> None:
        metrics, generations, admission = self._instruments.metrics, self.generations, self.admission
        metrics.set_model(self._engine.model)
        metrics.bind_gauges(
            active=lambda: admission.active,
            queued=lambda: admission.waiting,
            readers=lambda: generations.readers,
            state_problem=lambda: self._store is not None and self._store.problem is not None,
            encoder_hung=lambda: self._encoder.hung,
            log_bytes=lambda: sum(generation.size for generation in generations.running),
            retained=lambda: len(generations.retained),
            retained_bytes=lambda: generations.retained.size,
        )

    async def _watch(self, runner: Runner, estimator: StepTimeEstimator) -> None:
        """Ends the process when a generation hangs, also one of the warm-up."""
        watchdog = Watchdog(
            lambda: [*runner.warming_up, *self.generations.running],
            lambda job: estimator.usual_pause(job, self.admission.progressing),
            self._settings.watchdog_seconds,
            lambda: self.admission.usual_wait,
        )
        self._instruments.metrics.bind_gauges(longest_pause=lambda: watchdog.longest_pause)

        async def end_orderly(stalls: Sequence[Stall]) -> None:
            async def end_generations() -> None:
                await self.generations.abort_stalled([stall.generation for stall in stalls])

            if self._on_stall is None:
                await end_generations()
            else:
                await self._on_stall(end_generations)
            if self._store is not None:
                await self._store.close()

        await end_when_stalled(watchdog, end_orderly)

    async def _drain(self) -> None:
        grace = self._settings.drain_seconds
        _log.info("draining", grace=grace)
        self.generations.reject_new(retry_after=grace + FINAL_MESSAGE_GRACE_SECONDS)
        waiting = {asyncio.ensure_future(self.generations.idle()), asyncio.ensure_future(self._hurry.wait())}
        try:
            await asyncio.wait(waiting, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
            if not await self.generations.abort_all():
                self._left_behind = True
