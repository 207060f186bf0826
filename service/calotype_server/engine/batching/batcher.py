"""StepBatcher: one device thread runs the denoiser for all requests."""

from __future__ import annotations

import contextvars
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import structlog
import torch

from calotype_server import errors
from calotype_server.engine.batching.collate import Call, Collator, Digests
from calotype_server.engine.batching.proxy import DenoiserProxy
from calotype_server.engine.batching.run_ahead import RunAhead
from calotype_server.engine.batching.scheduler import BatchScheduler, PendingCall, RequestSlot
from calotype_server.engine.tap import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.engine.batching.measure import Threads

__all__ = ["BatchRecord", "DenoiserSession", "StepBatcher", "is_out_of_memory"]

_log = structlog.get_logger(__name__)

_BATCHES_TO_GROW = 100


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One call of the denoiser.

    Attributes:
        started: On the clock of `time.monotonic`, in seconds.
        seconds: Duration. On CUDA, where calls return before they are computed, until the call before was computed.
        streams: Numbers of the streams whose calls were joined, in the order of their rows.
        rows: Rows that belong to somebody.
        padded_rows: All rows that were computed.
    """

    started: float
    seconds: float
    streams: tuple[int, ...]
    rows: int
    padded_rows: int


class DenoiserSession:
    """One request's access to the denoiser; leave it, as a context manager, when the request has ended.

    `cancel` may be called by any thread, everything else by the request's.

    Attributes:
        number: From 0, in the order of opening.
    """

    def __init__(self, batcher: StepBatcher, number: int, should_stop: Callable[[], bool]) -> None:
        self.number = number
        self._batcher = batcher
        self._should_stop = should_stop
        self._digests: Digests = {}
        self._seat = RequestSlot(number)
        self._ticket: PendingCall | None = None
        self._cancelled = False
        self._calls = self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.expect_no_more()
        self._digests.clear()
        self._ticket = None

    @property
    def mean_rows(self) -> float:
        """Rows that were computed together with a call of this request on average, its own included."""
        return self._rows / self._calls if self._calls else 0.0

    def proxy(self) -> DenoiserProxy:
        """Returns what to put in the place of the denoiser."""
        return DenoiserProxy(self._batcher.module, self._call)

    def expect_no_more(self) -> None:
        """Tells the others not to wait: the last step is done. A call that comes all the same is served."""
        self._batcher._excuse(self)

    def cancel(self) -> None:
        """Makes the request's waiting call, or else its next one, raise `Stopped` at once."""
        self._batcher._cancel(self)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._should_stop():
            raise Stopped
        call = self._batcher.collator.bind(args, kwargs, self._digests)
        ticket = self._batcher._park(self, call)
        answer = ticket.future.result()
        self._calls += 1
        self._rows += ticket.batch_rows
        return answer


class StepBatcher:
    """Runs the calls of concurrent requests together, on a thread of its own that nobody else's trouble can end.

    A call that fails in company is tried again in halves until whoever is to blame is alone. Memory that runs out
    lowers the number of rows that run at once, which rises again slowly. After a failure of the device every call
    raises `EngineDead`.

    Args:
        module: The denoiser; from now on nobody else may call it.
        max_rows: Most rows to compute at once, from 1; see `policy.knee`.
        threads: That torch computes each call with; None for torch's default.
        deterministic: Fill every batch up to `max_rows`, so that a result is bitwise the same in any company. It holds
            for as long as memory suffices for `max_rows`.
        on_batch: Called by the device thread after each call of the denoiser; it must not block.
    """

    def __init__(
        self,
        module: Any,
        *,
        max_rows: int,
        threads: Threads | None = None,
        deterministic: bool = False,
        on_batch: Callable[[BatchRecord], None] | None = None,
    ) -> None:
        self.module = module
        self.collator = Collator(module, exact=deterministic)
        self._rendezvous = BatchScheduler(max_rows)
        self._most_rows = max_rows
        self._threads = threads
        self._deterministic = deterministic
        self._on_batch = on_batch
        self._run_ahead = RunAhead(_device(module))
        self._opened = 0
        self._successes = 0
        self._changed = threading.Condition()
        """Guards everything below, the rendezvous, and the tickets and seats of all streams."""
        self._running: list[PendingCall] = []
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="calotype-device", daemon=True)
        self._thread.start()

    @property
    def max_rows(self) -> int:
        """Rows that run at once: as asked for, or fewer since memory ran out."""
        return self._rendezvous.max_rows

    def stream(self, *, should_stop: Callable[[], bool] = lambda: False) -> DenoiserSession:
        """Opens a stream for one request.

        Args:
            should_stop: Asked before each call; True raises `Stopped`.
        """
        with self._changed:
            number, self._opened = self._opened, self._opened + 1
        return DenoiserSession(self, number, should_stop)

    def close(self) -> None:
        """Ends the device thread after the batch that it runs; calls that wait, and later ones, raise `Draining`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # Called by requests' threads, through their streams.

    def _park(self, stream: DenoiserSession, call: Call) -> PendingCall:
        with self._changed:
            if stream._cancelled:
                raise Stopped
            if self._closing or self._failure is not None:
                raise self._refusal()
            stream._ticket = ticket = PendingCall(stream._seat, call, time.monotonic())
            self._rendezvous.arrive(ticket)
            self._changed.notify()
        return ticket

    def _excuse(self, stream: DenoiserSession) -> None:
        with self._changed:
            self._rendezvous.stop_waiting_for(stream._seat)
            self._changed.notify()

    def _cancel(self, stream: DenoiserSession) -> None:
        with self._changed:
            stream._cancelled = True
            self._rendezvous.stop_waiting_for(stream._seat)
            if stream._ticket is not None:
                self._rendezvous.withdraw(stream._ticket)
                _give(stream._ticket, Stopped())
            self._changed.notify()

    def _refusal(self) -> errors.GenerationError:
        if self._failure is None:
            return errors.Draining("The server is stopping.")
        dead = errors.EngineDead("The device failed.")
        dead.__cause__ = self._failure
        return dead

    # Called by the device thread.

    def _run(self) -> None:
        try:
            self._run_ahead.begin()
            # Requests' threads have it from their pipelines; it does not reach across threads.
            with torch.no_grad():
                while self._run_next():
                    pass
        except BaseException as error:
            context = self._running[0].context if self._running else contextvars.copy_context()
            context.run(_log.exception, "the device failed")
            self._failure = error
        finally:
            with self._changed:
                self._closing = True
                for ticket in (*self._running, *self._rendezvous.waiting):
                    _give(ticket, self._refusal())
                self._rendezvous.waiting.clear()
                self._running.clear()

    def _run_next(self) -> bool:
        """Waits for calls and runs them; False when there will be no more."""
        with self._changed:
            while not self._closing:
                tickets, deadline = self._rendezvous.pick(time.monotonic())
                if tickets:
                    self._running = tickets
                    break
                self._changed.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))
            else:
                return False
        self._run_together(tickets)
        self._running = []
        return True

    def _run_together(self, tickets: list[PendingCall]) -> None:
        """Answers all tickets, together if that succeeds."""
        tickets = [ticket for ticket in tickets if not ticket.future.done()]  # cancelled meanwhile
        if not tickets:
            return
        rows = sum(ticket.call.rows for ticket in tickets)
        padded_rows = max(rows, self.max_rows) if self._deterministic else rows
        error = self._try_together(tickets, rows, padded_rows)
        if error is None:
            return
        if isinstance(error, torch.AcceleratorError):
            raise error
        # Its frames would keep what was computed so far alive: memory that the next try, or somebody else, needs.
        traceback.clear_frames(error.__traceback__)
        out_of_memory = is_out_of_memory(error)
        if out_of_memory and self._run_ahead.on_cuda:
            torch.cuda.empty_cache()
        alone, filled = len(tickets) == 1, padded_rows > rows
        if alone and not (out_of_memory and filled):
            with self._changed:
                _give(tickets[0], error)
            return
        del error
        if out_of_memory:
            self._lower_max_rows(padded_rows // 2, tickets)
        if alone:
            self._run_together(tickets)
            return
        half = len(tickets) // 2
        self._run_together(tickets[:half])
        self._run_together(tickets[half:])

    def _try_together(self, tickets: list[PendingCall], rows: int, padded_rows: int) -> BaseException | None:
        calls = [ticket.call for ticket in tickets]
        started = time.monotonic()
        if self._threads is not None:
            # Torch keeps the number by thread, and setting it costs less than a microsecond.
            torch.set_num_threads(self._threads.of(padded_rows))
        try:
            args, kwargs = self.collator.join(calls, padded_rows)
            # What the denoiser logs carries the ids of the first of those that share it.
            output = tickets[0].context.run(self.module, *args, **kwargs)
            parts = self.collator.split(output, calls, padded_rows)
        except BaseException as error:
            return error
        self._answer(tickets, parts, rows)
        self._run_ahead.follow()
        seconds = time.monotonic() - started
        with self._changed:
            self._rendezvous.observe(seconds)
            self._raise_max_rows()
        if self._on_batch is not None:
            streams = tuple(ticket.seat.number for ticket in tickets)
            self._report(self._on_batch, BatchRecord(started, seconds, streams, rows, padded_rows))
        return None

    def _answer(self, tickets: Sequence[PendingCall], parts: Sequence[Any], rows: int) -> None:
        with self._changed:
            now = time.monotonic()
            for ticket, part in zip(tickets, parts, strict=True):
                if not ticket.future.done():
                    self._rendezvous.expect(ticket.seat, now)
                    ticket.batch_rows = rows
                    _give(ticket, part)

    def _report(self, on_batch: Callable[[BatchRecord], None], record: BatchRecord) -> None:
        try:
            on_batch(record)
        except Exception:
            _log.exception("a batch cannot be reported")

    def _lower_max_rows(self, rows: int, tickets: Sequence[PendingCall]) -> None:
        with self._changed:
            self._rendezvous.max_rows = max(1, rows)
            self._successes = 0
        for ticket in tickets:
            ticket.context.run(_log.warning, "memory ran out", max_rows=self.max_rows)

    def _raise_max_rows(self) -> None:
        self._successes += 1
        if self._successes >= _BATCHES_TO_GROW and self.max_rows < self._most_rows:
            self._successes = 0
            self._rendezvous.max_rows += 1


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether memory ran out, on a device or on the host, for which torch has no type of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _give(ticket: PendingCall, value: Any) -> None:
    """Answers a ticket with a value or an exception, unless it has been. Needs the batcher's lock."""
    if ticket.future.done():
        return
    if isinstance(value, BaseException):
        ticket.future.set_exception(value)
    else:
        ticket.future.set_result(value)


def _device(module: Any) -> torch.device:
    parameter = next(iter(module.parameters()), None) if isinstance(module, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
