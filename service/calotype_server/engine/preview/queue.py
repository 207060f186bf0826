"""One generation's queue to the preview thread: it decides which steps are due, and holds the newest of them."""

from __future__ import annotations

import contextvars
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype_server.engine.preview.cadence import PreviewSchedule
from calotype_server.observability.events import Observe, StepDone, ignore
from calotype_server.types import Denoising, PreviewMethod

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch

    from calotype_server.engine.preview.budget import PreviewBudget
    from calotype_server.engine.preview.device_stream import DeviceStream
    from calotype_server.engine.tap import Step
    from calotype_server.types import Event, Job

__all__ = ["PendingPreview", "PreviewQueue"]


@dataclass(frozen=True, slots=True)
class PendingPreview:
    """A step to show.

    Attributes:
        step: The step.
        method: The decoder to use.
        launched: Event on the device after which the step's tensors can be read; None on a CPU.
    """

    step: Step
    method: PreviewMethod
    launched: torch.cuda.Event | None


class PreviewQueue:
    """Takes the steps of one generation. It holds one step: a newer one that is due replaces it.

    Args:
        job: The generation's job.
        report: Receives its events.
        methods: The available methods.
        budget: Chooses among them, and records how long steps take.
        stream: Where previews are computed.
        open_queues: Returns the number of open queues; their generations share the denoiser's time equally.
        on_due: Called when a step is ready to be taken.
        on_close: Called once the queue is closed.
        observe: Receives an observation for each step.
    """

    def __init__(
        self,
        job: Job,
        report: Callable[[Event], None],
        *,
        methods: Collection[PreviewMethod],
        budget: PreviewBudget,
        stream: DeviceStream,
        open_queues: Callable[[], int],
        on_due: Callable[[PreviewQueue], None],
        on_close: Callable[[PreviewQueue], None],
        observe: Observe = ignore,
    ) -> None:
        self.job = job
        self.report = report
        self.context = contextvars.copy_context()
        """Of the generation's thread, so that lines logged by the preview thread carry its ids."""
        self._methods = methods
        self._budget = budget
        self._stream = stream
        self._open_queues = open_queues
        self._on_due = on_due
        self._on_close = on_close
        self._observe = observe
        self._schedule = PreviewSchedule(job.preview)
        self._method: PreviewMethod | None = None
        self._offered_at: float | None = None
        self._invalid = False
        self._safe: bool | None = None
        self._changed = threading.Condition()
        """Guards everything below."""
        self._pending: PendingPreview | None = None
        self._rendering = False
        self._skipped = 0

    @property
    def invalid(self) -> bool:
        """Whether the latents were seen to hold NaN or infinity."""
        return self._invalid

    @property
    def safe(self) -> bool | None:
        """Verdict of the safety checker on the predicted image; None before the check."""
        return self._safe

    def mark_invalid(self) -> None:
        """Records that the latents hold NaN or infinity."""
        self._invalid = True

    def record_verdict(self, safe: bool) -> None:
        """Records the verdict of the safety checker."""
        self._safe = safe

    def offer(self, step: Step) -> None:
        """Offers a finished step; returns at once."""
        now = time.monotonic()
        if self._offered_at is not None:
            self._observe(StepDone(now - self._offered_at))
            # Each generation pays for its previews from its own share of the step.
            share = (now - self._offered_at) / self._open_queues()
            self._budget.observe_step(share, self.job.pixel_count)
        self._offered_at = now
        stride = self._choose_method()
        if self._method is None or not self._schedule.due(step.number, step.total, stride):
            self.report(Denoising(step.number, step.total))
            return
        pending = PendingPreview(step, self._method, self._stream.record())
        with self._changed:
            replaced, self._pending = self._pending, pending
            self._skipped += replaced is not None
        if replaced is None:
            self._on_due(self)
        else:
            # Rendering takes longer than a step; progress is reported anyway.
            self.report(Denoising(step.number, step.total))

    def take(self) -> PendingPreview | None:
        """Takes the waiting step; None after `close`. Call `done` afterwards."""
        with self._changed:
            pending, self._pending = self._pending, None
            self._rendering = pending is not None
        return pending

    def take_skipped(self) -> int:
        """Returns how many previews were due but not shown since the last call."""
        with self._changed:
            skipped, self._skipped = self._skipped, 0
        return skipped

    def skip(self) -> None:
        """Counts the step that was taken as not shown, because rendering it failed."""
        with self._changed:
            self._skipped += 1

    def done(self) -> None:
        """Records that the step that was taken has been reported."""
        with self._changed:
            self._rendering = False
            self._changed.notify_all()

    def flush(self) -> None:
        """Blocks until all steps that are due have been reported, so that the last preview comes before the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending is None and not self._rendering)

    def close(self) -> None:
        """Drops a waiting step and closes the queue."""
        self._on_close(self)
        with self._changed:
            self._pending = None
            self._changed.notify_all()

    def _choose_method(self) -> int:
        """Sets the method for this step and returns the budget's stride."""
        wanted = self.job.preview.method
        if wanted is not PreviewMethod.AUTO:
            self._method = wanted if wanted in self._methods else None
            return 1
        choice = self._budget.choose(self._methods, self.job.pixel_count, self._method)
        self._method = None if choice is None else choice.method
        return 1 if choice is None else choice.stride
