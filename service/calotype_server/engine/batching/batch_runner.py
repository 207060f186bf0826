"""BatchRunner: computes one batch of calls, and isolates the calls that make it fail."""

from __future__ import annotations

import time
import traceback
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import torch

from calotype_server.engine.batching.run_ahead import RunAhead
from calotype_server.engine.machine import device_of
from calotype_server.engine.memory import is_device_failure, is_out_of_memory, release_cached_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.engine.batching.measure import Threads
    from calotype_server.engine.batching.pending import PendingCall
    from calotype_server.engine.runtime.base import DenoiserRuntime

__all__ = ["BatchObserver", "BatchRecord", "BatchRunner"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One call of the denoiser.

    Attributes:
        started: Start on the clock of `time.monotonic`, in seconds.
        seconds: Time that the device took. On CUDA, it begins when the previous call is computed, if that is later
            than `started`.
        sessions: Numbers of the sessions whose calls were joined, in the order of their rows.
        rows: Rows that belong to a request.
        padded_rows: All rows that were computed.
    """

    started: float
    seconds: float
    sessions: tuple[int, ...]
    rows: int
    padded_rows: int


class BatchObserver(Protocol):
    """Receives the results of batches on the device thread; implemented by `StepBatcher`."""

    @property
    def max_rows(self) -> int:
        """Most rows to run at once."""
        ...

    def answered(self, calls: Sequence[PendingCall], answers: Sequence[Any], rows: int, started: float) -> None:
        """Receives the answers to a batch of this many rows, which a CUDA device may still compute.

        The launch began at `started`, on the clock of `time.monotonic`.
        """
        ...

    def computed(self) -> float:
        """Called after `answered`, once for each batch, when the device has computed it; returns its seconds."""
        ...

    def ran_out_of_memory(self, max_rows: int) -> None:
        """Called when memory allows at most this many rows."""
        ...


def _by_loras(pending: PendingCall) -> tuple[tuple[str, float], ...]:
    return tuple((lora.name, lora.scale) for lora in pending.call.loras)


class BatchRunner:
    """Computes batches in the calling thread.

    A batch that fails is split in half and tried again, until the failing calls run alone. Only a failure of the device
    itself is raised.

    Args:
        runtime: Computes the denoiser.
        observer: Receives results.
        threads: CPU threads to compute each call with; None for torch's default.
        deterministic: Fill every batch up to `max_rows`.
        on_batch: Called after each call of the denoiser is computed; it must not block.
        run_ahead: Follows the device.
    """

    def __init__(
        self,
        runtime: DenoiserRuntime,
        observer: BatchObserver,
        *,
        threads: Threads | None,
        deterministic: bool,
        on_batch: Callable[[BatchRecord], None] | None,
        run_ahead: RunAhead | None = None,
    ) -> None:
        self._runtime = runtime
        self._observer = observer
        self._threads = threads
        self._deterministic = deterministic
        self._on_batch = on_batch
        self._device = device_of(runtime.module)
        self._run_ahead = run_ahead or RunAhead(self._device)
        self._launched: deque[tuple[float, Sequence[PendingCall], int, int]] = deque()
        """Start of the launch, calls, rows and padded rows of each batch that is not computed."""

    def start(self) -> None:
        """Prepares the calling thread. Call it once, before `run`."""
        self._run_ahead.start()

    def run(self, calls: Sequence[PendingCall]) -> None:
        """Settles all calls; together, if that succeeds.

        If memory runs out, the runtime frees what only serves speed, and the batch is tried again. If that does not
        help, fewer rows run at once.

        Raises:
            RuntimeError: The device failed; see `is_device_failure`.
        """
        self._run(calls, may_free=True)

    def _run(self, calls: Sequence[PendingCall], *, may_free: bool) -> None:
        calls = [pending for pending in calls if not pending.future.done()]  # Some may be cancelled by now.
        if not calls:
            return
        # Neighbours with the same LoRAs are computed together.
        calls.sort(key=_by_loras)
        rows = sum(pending.call.rows for pending in calls)
        padded_rows = max(rows, self._observer.max_rows) if self._deterministic else rows
        error = self._try(calls, rows, padded_rows)
        if error is None:
            return
        if is_device_failure(error):
            raise error
        # The traceback's frames keep intermediate results alive, and the next try may need their memory.
        traceback.clear_frames(error.__traceback__)
        out_of_memory = is_out_of_memory(error)
        if out_of_memory and may_free and self.free_memory():
            del error
            # Once: the runtime may need the same memory again, and run out of it again.
            self._run(calls, may_free=False)
            return
        alone, padded = len(calls) == 1, padded_rows > rows
        if alone and not (out_of_memory and padded):
            calls[0].fail(error)
            return
        del error
        if out_of_memory:
            self._lower_max_rows(padded_rows // 2, calls)
        if alone:
            self.run(calls)
            return
        half = len(calls) // 2
        self.run(calls[:half])
        self.run(calls[half:])

    def free_memory(self) -> bool:
        """Frees device memory that only serves speed. Returns whether the runtime had any."""
        freed = self._runtime.free_memory()
        release_cached_memory(self._device)
        return freed

    def _try(self, pending: Sequence[PendingCall], rows: int, padded_rows: int) -> BaseException | None:
        """Computes a batch; returns what went wrong."""
        calls = [each.call for each in pending]
        started = time.monotonic()
        if self._threads is not None:
            # Torch keeps the number per thread, and setting it takes less than a microsecond.
            torch.set_num_threads(self._threads.of(padded_rows))
        try:
            # Lines that the denoiser logs carry the ids of the first request in the batch.
            output = pending[0].context.run(self._runtime.run, calls, padded_rows)
            answers = self._runtime.collator.split(output, calls, padded_rows)
        except BaseException as error:
            return error
        # Before the answers are given: work that a request launches now does not belong to the batch.
        self._run_ahead.launched()
        self._launched.append((started, pending, rows, padded_rows))
        self._observer.answered(pending, answers, rows, started)
        self.poll()
        return None

    def poll(self) -> None:
        """Reports the batches that the device has computed since the last call. On a CPU, `run` does so.

        Raises:
            torch.AcceleratorError: The device failed.
        """
        for _ in range(self._run_ahead.computed()):
            started, calls, rows, padded_rows = self._launched.popleft()
            seconds = self._observer.computed()
            if self._on_batch is not None:
                sessions = tuple(each.slot.number for each in calls)
                self._report(self._on_batch, BatchRecord(started, seconds, sessions, rows, padded_rows))

    def _report(self, on_batch: Callable[[BatchRecord], None], record: BatchRecord) -> None:
        try:
            on_batch(record)
        except BaseException:  # Exceptions of any class: all generations wait for this thread.
            _log.exception("a batch cannot be reported")

    def _lower_max_rows(self, rows: int, calls: Sequence[PendingCall]) -> None:
        self._observer.ran_out_of_memory(max(1, rows))
        for pending in calls:
            pending.context.run(_log.warning, "memory ran out", max_rows=self._observer.max_rows)
