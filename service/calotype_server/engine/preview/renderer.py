"""The preview thread: turns finished steps into pictures without ever making the denoiser wait."""

from __future__ import annotations

import contextvars
import queue
import threading
from typing import TYPE_CHECKING

import structlog
import torch

from calotype_server.types import Denoising, Event, Pixels, PreviewReady

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.engine.preview.head import PreviewHead
    from calotype_server.engine.tap import Step
    from calotype_server.types import Job

__all__ = ["PreviewFeed", "PreviewRenderer"]

_log = structlog.get_logger(__name__)


class PreviewFeed:
    """One generation's line to the preview thread: a slot for the newest step. An unrendered one is replaced."""

    def __init__(self, job: Job, report: Callable[[Event], None], ready: Callable[[PreviewFeed], None]) -> None:
        self.job = job
        self.report = report
        self.broken = False
        """Whether the latents were seen to hold NaN or infinity."""
        self.context = contextvars.copy_context()
        """So that lines logged by the preview thread carry the generation's ids."""
        self._ready = ready
        self._lock = threading.Lock()
        self._slot: Step | None = None
        self._skipped = 0

    def offer(self, step: Step) -> None:
        """Hands over a step; returns at once."""
        with self._lock:
            waiting, self._slot = self._slot, step
            self._skipped += waiting is not None
        if waiting is None:
            self._ready(self)

    def take(self) -> tuple[Step, int] | None:
        """Takes the newest step and how many were replaced before it; None after `close`."""
        with self._lock:
            step, self._slot = self._slot, None
            skipped, self._skipped = self._skipped, 0
        return None if step is None else (step, skipped)

    def close(self) -> None:
        """Forgets a step that nobody will see any more."""
        with self._lock:
            self._slot = None


class PreviewRenderer:
    """A thread that renders the steps of all feeds, in the order in which they became due.

    Args:
        head: Draws the pictures.
    """

    def __init__(self, head: PreviewHead) -> None:
        self._head = head
        self._due: queue.SimpleQueue[PreviewFeed | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="calotype-preview", daemon=True)
        self._thread.start()

    def feed(self, job: Job, report: Callable[[Event], None]) -> PreviewFeed:
        """Opens a line for one generation; previews come out of `report`."""
        return PreviewFeed(job, report, self._due.put)

    def close(self) -> None:
        """Ends the thread after what is due."""
        self._due.put(None)
        self._thread.join()

    def _run(self) -> None:
        # The cores belong to the denoiser; the setting holds for the calling thread.
        torch.set_num_threads(1)
        while (feed := self._due.get()) is not None:
            try:
                self._serve(feed)
            except Exception:
                # One generation's trouble; the thread works for all of them.
                feed.context.run(_log.exception, "preview cannot be reported")

    def _serve(self, feed: PreviewFeed) -> None:
        taken = feed.take()
        if taken is None:
            return
        step, skipped = taken
        try:
            pixels = self._render(step, feed)
        except Exception:
            feed.context.run(_log.exception, "preview failed", step=step.number)
            pixels = None
        if pixels is None:
            feed.report(Denoising(step.number, step.total))
        else:
            feed.report(PreviewReady(step.number, step.total, pixels, skipped))

    def _render(self, step: Step, feed: PreviewFeed) -> Pixels | None:
        x0 = step.x0()
        if x0 is None:
            return None
        if not torch.isfinite(x0).all():
            # At zero signal, x0 of an epsilon model may be infinite; the latents themselves must not be.
            feed.broken = not bool(torch.isfinite(step.sample).all() and torch.isfinite(step.model_output).all())
            return None
        picture = self._head.render(x0, feed.job.width, feed.job.height)
        height, width, _ = picture.shape
        return Pixels(width, height, picture.numpy().tobytes())
