"""One generation's line to the preview thread: which steps are due, and a slot for the newest of them."""

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
    """A step to draw, what with, and what to wait for on the device."""

    step: Step
    method: PreviewMethod
    mark: torch.cuda.Event | None


class PreviewQueue:
    """Takes the steps of one generation. An unrendered one is replaced by the next that is due.

    Args:
        job: The generation's.
        report: Takes its events.
        methods: What can draw.
        budget: Chooses among them, and learns how long steps take.
        lane: Where previews are computed.
        company: The feeds that are open, among which the denoiser's time is divided; this one joins them until `close`.
        ready: Told when the slot is filled.
        observe: Told of each step.
    """

    def __init__(
        self,
        job: Job,
        report: Callable[[Event], None],
        *,
        methods: Collection[PreviewMethod],
        budget: PreviewBudget,
        lane: DeviceStream,
        company: set[PreviewQueue],
        ready: Callable[[PreviewQueue], None],
        observe: Observe = ignore,
    ) -> None:
        self.job = job
        self.report = report
        self.broken = False
        """Whether the latents were seen to hold NaN or infinity."""
        self.passed: bool | None = None
        """What the safety checker said about the predicted picture; None before it was asked."""
        self.context = contextvars.copy_context()
        """So that lines logged by the preview thread carry the generation's ids."""
        self._methods = methods
        self._budget = budget
        self._lane = lane
        self._company = company
        self._ready = ready
        self._observe = observe
        self._cadence = PreviewSchedule(job.preview)
        self._method: PreviewMethod | None = None
        self._offered_at: float | None = None
        self._changed = threading.Condition()
        self._slot: PendingPreview | None = None
        self._rendering = False
        self._lost = 0
        company.add(self)

    def offer(self, step: Step) -> None:
        """Hands over a step; returns at once."""
        now = time.monotonic()
        if self._offered_at is not None:
            self._observe(StepDone(now - self._offered_at))
            # Others' previews have to be paid from their part of the step.
            part = (now - self._offered_at) / len(self._company)
            self._budget.observe_step(part, self.job.pixel_count)
        self._offered_at = now
        stride = self._choose()
        if self._method is None or not self._cadence.due(step.number, step.total, stride):
            self.report(Denoising(step.number, step.total))
            return
        due = PendingPreview(step, self._method, self._lane.mark())
        with self._changed:
            waiting, self._slot = self._slot, due
            self._lost += waiting is not None
        if waiting is None:
            self._ready(self)
        else:
            # Drawing takes longer than a step; the progress is told all the same.
            self.report(Denoising(step.number, step.total))

    def take(self) -> PendingPreview | None:
        """Takes the step in the slot; None after `close`. `done` must follow."""
        with self._changed:
            due, self._slot = self._slot, None
            self._rendering = due is not None
        return due

    def lost(self) -> int:
        """Returns how many previews were due and are lost since this was last asked."""
        with self._changed:
            lost, self._lost = self._lost, 0
        return lost

    def failed(self) -> None:
        """The step that was taken could not be drawn."""
        with self._changed:
            self._lost += 1

    def done(self) -> None:
        """What became of the step that was taken has been reported."""
        with self._changed:
            self._rendering = False
            self._changed.notify_all()

    def flush(self) -> None:
        """Returns when what is due has been drawn and reported: the last step comes before the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._slot is None and not self._rendering)

    def close(self) -> None:
        """Forgets a step that nobody will see any more, and leaves the company."""
        self._company.discard(self)
        with self._changed:
            self._slot = None
            self._changed.notify_all()

    def _choose(self) -> int:
        """Sets the method for this step and returns the budget's stride."""
        wanted = self.job.preview.method
        if wanted is not PreviewMethod.AUTO:
            self._method = wanted if wanted in self._methods else None
            return 1
        choice = self._budget.choose(self._methods, self.job.pixel_count, self._method)
        self._method = None if choice is None else choice.method
        return 1 if choice is None else choice.stride
