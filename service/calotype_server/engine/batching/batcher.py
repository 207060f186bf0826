"""StepBatcher: one device thread runs the denoiser for all requests."""

from __future__ import annotations

import contextvars
import threading
import time
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server import errors
from calotype_server.engine.batching.batch_runner import BatchRecord, BatchRunner
from calotype_server.engine.batching.scheduler import BatchScheduler
from calotype_server.engine.batching.session import DenoiserSession
from calotype_server.engine.runtime.device_thread import DeviceThread
from calotype_server.engine.tap import Stopped
from calotype_server.failpoints import hit
from calotype_server.types import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.engine.batching.measure import Threads
    from calotype_server.engine.batching.pending import PendingCall, RequestSlot
    from calotype_server.engine.batching.run_ahead import RunAhead
    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.engine.runtime.collate import Collator
    from calotype_server.engine.step_cache.cache import StepCache
    from calotype_server.types import Lora

__all__ = ["StepBatcher"]

_log = structlog.get_logger(__name__)

_BATCHES_TO_GROW = 100
"""After this many batches without trouble, a limit that was lowered rises by one row."""

_POLLS_IN_WAIT = 4
"""How often the device is asked, within the longest wait for a request, whether it has computed a batch."""


class StepBatcher:
    """Runs the calls of concurrent requests together, on one thread, which no request's failure can end.

    If a joined call fails, its halves are tried again until the failing request is alone. If memory runs out, fewer
    rows run at once; the number rises again slowly. After a failure of the device every call raises `EngineDead`.

    Args:
        runtime: Computes the denoiser, which from now on nothing else may call.
        max_rows: Most rows to compute at once, from 1; see `measure.knee`.
        thread: Runs the calls, and ends with the batcher: the thread in which the runtime was started. None: a new one.
        threads: CPU threads to compute each call with; None for torch's default.
        deterministic: Fill every batch up to `max_rows`, so that a result is bitwise the same regardless of the other
            rows in the batch. This holds as long as memory suffices for `max_rows`.
        schedule: Which requests come first if not all fit into one batch.
        on_batch: Called by the device thread after each call of the denoiser; it must not block.
        run_ahead: Follows the device; None for the one of the module.
        mixes_loras: Whether calls with different LoRAs may be joined.
    """

    def __init__(
        self,
        runtime: DenoiserRuntime,
        *,
        max_rows: int,
        thread: DeviceThread | None = None,
        threads: Threads | None = None,
        deterministic: bool = False,
        schedule: Schedule = Schedule.FIRST_LOOK,
        on_batch: Callable[[BatchRecord], None] | None = None,
        run_ahead: RunAhead | None = None,
        mixes_loras: bool = True,
    ) -> None:
        self._runtime = runtime
        self._mixes_loras = mixes_loras
        self._runner = BatchRunner(
            runtime, self, threads=threads, deterministic=deterministic, on_batch=on_batch, run_ahead=run_ahead
        )
        self._scheduler = BatchScheduler(max_rows, schedule)
        self._configured_max_rows = max_rows
        self._opened = 0
        self._successes = 0
        self._changed = threading.Condition()
        """Guards everything below, the scheduler, and the calls and slots of all sessions."""
        self._running: Sequence[PendingCall] = ()
        self._closing = False
        self._freeing = False
        self._failure: BaseException | None = None
        if thread is None:
            thread = DeviceThread()
            thread.call(runtime.start)
        self._thread = thread
        self._thread.end_with(self._run)

    @property
    def module(self) -> Any:
        """The denoiser, for its attributes."""
        return self._runtime.module

    @property
    def collator(self) -> Collator:
        """Joins the calls of the module."""
        return self._runtime.collator

    @property
    def mixes_loras(self) -> bool:
        """Whether calls with different LoRAs may be joined."""
        return self._mixes_loras

    @property
    def max_rows(self) -> int:
        """Most rows to run at once: as configured, or fewer since memory ran out."""
        return self._scheduler.max_rows

    def open_session(
        self,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_submitted: Callable[[], None] = lambda: None,
        cache: StepCache | None = None,
        loras: tuple[Lora, ...] = (),
        alone: bool = False,
    ) -> DenoiserSession:
        """Opens a session for one request.

        Args:
            should_stop: Called before each call of the denoiser; True raises `Stopped`.
            on_submitted: Called after each call of the denoiser is submitted, before its answer is awaited, and after
                each call that is not computed.
            cache: Decides which calls are computed; None for all.
            loras: LoRAs to apply to all calls. They need a `LoraRuntime`.
            alone: Whether its calls are never joined with those of other requests.
        """
        with self._changed:
            number, self._opened = self._opened, self._opened + 1
        return DenoiserSession(self, number, should_stop, on_submitted, cache, loras, alone)

    def close(self) -> None:
        """Ends the device thread after the current batch; waiting calls and later ones raise `Draining`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.close()

    def free_memory(self) -> None:
        """Lets the device thread free memory that only serves speed, before the next batch. Any thread may call it."""
        with self._changed:
            self._freeing = True
            self._changed.notify()

    # Called by the requests' threads, through their sessions; see `CallQueue`.

    def submit(self, pending: PendingCall) -> None:
        """Queues a call, unless it is already cancelled; its future receives the answer.

        Raises:
            Draining: The batcher is closed.
            EngineDead: The device failed.
        """
        with self._changed:
            if pending.future.done():
                return
            if self._closing or self._failure is not None:
                raise self._closed_error()
            self._scheduler.arrive(pending)
            self._changed.notify()

    def note_look(self, slot: RequestSlot) -> None:
        """Records that a request has finished its first step."""
        with self._changed:
            self._scheduler.note_look(slot)
            self._changed.notify()

    def stop_waiting_for(self, slot: RequestSlot) -> None:
        """Lets other requests run without waiting for this one."""
        with self._changed:
            self._scheduler.stop_waiting_for(slot)
            self._changed.notify()

    def withdraw(self, slot: RequestSlot, pending: PendingCall | None) -> None:
        """Stops waiting for a request, and makes its call raise `Stopped` at once."""
        with self._changed:
            self._scheduler.stop_waiting_for(slot)
            if pending is not None:
                self._scheduler.withdraw(pending)
                pending.fail(Stopped())
            self._changed.notify()

    def _closed_error(self) -> errors.GenerationError:
        if self._failure is None:
            return errors.Draining("The server is stopping.")
        dead = errors.EngineDead("The device failed.")
        dead.__cause__ = self._failure
        return dead

    # Called by the device thread.

    def _run(self) -> None:
        try:
            self._runner.start()
            # Pipelines disable gradients in the requests' threads; this does not extend to other threads.
            with torch.no_grad():
                while self._run_next():
                    pass
        except BaseException as error:
            # First of all: whatever fails from now on, the callers see that the device is dead.
            self._failure = error
            context = self._running[0].context if self._running else contextvars.copy_context()
            context.run(_log.exception, "the device failed")
        finally:
            with self._changed:
                self._closing = True
                for pending in (*self._running, *self._scheduler.take_all()):
                    pending.fail(self._closed_error())
                self._running = ()

    def _run_next(self) -> bool:
        """Waits for calls and runs them. Returns False when the batcher closes."""
        while True:
            self._runner.poll()
            with self._changed:
                if self._closing:
                    return False
                freeing, self._freeing = self._freeing, False
                if not freeing:
                    now = time.monotonic()
                    calls, wake_at = self._scheduler.pick(now)
                    if calls:
                        self._running = calls
                        break
                    self._changed.wait(self._patience(wake_at, now))
            if freeing:
                self._runner.free_memory()
        hit("engine.batch")
        self._runner.run(calls)
        self._running = ()
        return True

    def _patience(self, wake_at: float | None, now: float) -> float | None:
        """Returns the longest time to wait for a change, in seconds; None if nothing else can happen."""
        times = [] if wake_at is None else [max(0.0, wake_at - now)]
        if self._scheduler.busy:
            times.append(self._scheduler.max_wait / _POLLS_IN_WAIT)
        return min(times, default=None)

    # Called by the runner, on the device thread; see `BatchObserver`.

    def answered(self, calls: Sequence[PendingCall], answers: Sequence[Any], rows: int, started: float) -> None:
        """Passes answers on, and expects the requests' next calls."""
        with self._changed:
            self._scheduler.launched(calls, started, time.monotonic())
            for pending, answer in zip(calls, answers, strict=True):
                pending.answer(answer, rows)

    def computed(self) -> float:
        """Updates the step time; after many successes, raises a limit that was lowered."""
        with self._changed:
            seconds = self._scheduler.computed(time.monotonic())
            self._successes += 1
            if self._successes >= _BATCHES_TO_GROW and self.max_rows < self._configured_max_rows:
                self._successes = 0
                self._scheduler.limit_rows(self.max_rows + 1)
            return seconds

    def ran_out_of_memory(self, max_rows: int) -> None:
        """Lowers the limit of rows."""
        with self._changed:
            self._scheduler.limit_rows(max_rows)
            self._successes = 0
