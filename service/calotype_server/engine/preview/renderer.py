"""The preview thread: turns finished steps into pictures without ever making the denoiser wait."""

from __future__ import annotations

import contextvars
import functools
import math
import threading
from collections import deque
from typing import TYPE_CHECKING

import structlog
import torch

from calotype_server.engine.preview.queue import PreviewQueue
from calotype_server.engine.preview.safety_gate import blurred
from calotype_server.observability.events import Observe, PreviewFailed, PreviewRendered, ignore
from calotype_server.types import Denoising, Event, Pixels, PreviewReady

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from calotype_server.engine.preview.budget import PreviewBudget
    from calotype_server.engine.preview.decoders import Decoder
    from calotype_server.engine.preview.device_stream import DeviceStream
    from calotype_server.engine.preview.queue import PendingPreview
    from calotype_server.engine.preview.safety_gate import SafetyGate
    from calotype_server.types import Job, PreviewMethod

__all__ = ["PreviewRenderer"]

_log = structlog.get_logger(__name__)

_MAX_CHORES = 8


class PreviewRenderer:
    """A thread that renders what is due: all feeds that are due together, and of one kind, as one batch.

    Args:
        decoders: What can draw.
        budget: Learns how long decoders take.
        lane: Where previews are computed.
        gate: Asked before a preview is shown sharp; None where the pipeline has no safety checker.
        observe: Told of steps and previews.
    """

    def __init__(
        self,
        decoders: Mapping[PreviewMethod, Decoder],
        budget: PreviewBudget,
        lane: DeviceStream,
        gate: SafetyGate | None = None,
        observe: Observe = ignore,
    ) -> None:
        self._decoders = decoders
        self._budget = budget
        self._lane = lane
        self._gate = gate
        self._observe = observe
        self._open: set[PreviewQueue] = set()
        self._changed = threading.Condition()
        self._due: deque[PreviewQueue] = deque()
        self._chores: deque[Callable[[], None]] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="calotype-preview", daemon=True)
        self._thread.start()

    def feed(self, job: Job, report: Callable[[Event], None]) -> PreviewQueue:
        """Opens a line for one generation; previews come out of `report`."""
        return PreviewQueue(
            job,
            report,
            methods=self._decoders.keys(),
            budget=self._budget,
            lane=self._lane,
            company=self._open,
            ready=self._enqueue,
            observe=self._observe,
        )

    def when_idle(self, chore: Callable[[], None]) -> None:
        """Runs `chore` on the preview thread when nothing is due; where too many wait already, it is forgotten."""
        with self._changed:
            if len(self._chores) < _MAX_CHORES:
                # In the caller's context, so that lines logged on the way carry its ids.
                self._chores.append(functools.partial(contextvars.copy_context().run, chore))
                self._changed.notify()

    def close(self) -> None:
        """Ends the thread after what is due."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, feed: PreviewQueue) -> None:
        with self._changed:
            self._due.append(feed)
            self._changed.notify()

    def _run(self) -> None:
        # The cores belong to the denoiser; the setting holds for the calling thread.
        torch.set_num_threads(1)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._chores or self._closed)
                feeds = list(self._due)
                self._due.clear()
                chore = self._chores.popleft() if not feeds and self._chores else None
            if feeds:
                self._serve(feeds)
            elif chore is not None:
                try:
                    chore()
                except BaseException:  # whatever it is, generations would wait for this thread in vain
                    _log.exception("the preview head cannot learn from a picture")
            else:
                return

    def _serve(self, feeds: Sequence[PreviewQueue]) -> None:
        groups: dict[tuple[object, ...], list[tuple[PreviewQueue, PendingPreview]]] = {}
        for feed in feeds:
            due = feed.take()
            if due is not None:
                kind = (due.method, due.step.sample.shape[1:], feed.job.width, feed.job.height)
                groups.setdefault(kind, []).append((feed, due))
        for group in groups.values():
            try:
                self._render_within(group)
            except BaseException as error:
                if len(group) == 1:
                    self._give_up(*group[0], error)
                    continue
                # Somebody's trouble; each for himself, so that it costs nobody else a preview.
                for member in group:
                    try:
                        self._render_within([member])
                    except BaseException as own:
                        self._give_up(*member, own)

    def _render_within(self, group: Sequence[tuple[PreviewQueue, PendingPreview]]) -> None:
        """Renders in the context of the first: lines that a decoder logs carry its ids."""
        group[0][0].context.copy().run(self._render, group)

    def _render(self, group: Sequence[tuple[PreviewQueue, PendingPreview]]) -> None:
        """Draws and reports the steps of one kind. Raises before anything is reported, or not at all."""
        method, job = group[0][1].method, group[0][0].job
        unchecked = sum(feed.passed is None for feed, _ in group)
        with torch.no_grad(), self._lane.after([due.mark for _, due in group]) as spent:
            predictions = [due.step.x0() for _, due in group]
            drawable = [
                x0 if x0 is not None and _is_finite(feed, due, x0) else None
                for (feed, due), x0 in zip(group, predictions, strict=True)
            ]
            known = [x0 for x0 in drawable if x0 is not None]
            pictures = self._decoders[method].decode(torch.cat(known), job.width, job.height) if known else None
            drawn = iter(() if pictures is None else torch.split(pictures, 1))
            images = [
                None if x0 is None else self._finish(feed, due, x0, next(drawn))
                for (feed, due), x0 in zip(group, drawable, strict=True)
            ]
        for _ in known:
            self._observe(PreviewRendered(method, spent.seconds / len(known)))
        if known and unchecked == sum(feed.passed is None for feed, _ in group):
            # Without the safety checker's time, which comes once in a generation.
            self._budget.observe_decode(method, spent.seconds / len(known), job.pixel_count)
        for (feed, due), x0, image in zip(group, predictions, images, strict=True):
            if x0 is not None and image is None:
                feed.failed()
            _report(feed, due, image)

    def _finish(
        self, feed: PreviewQueue, due: PendingPreview, x0: torch.Tensor, picture: torch.Tensor
    ) -> Pixels | None:
        if not _all_finite(picture):
            return None
        if self._gate is not None:
            if feed.passed is None and 2 * due.step.number >= due.step.total:
                feed.passed = self._gate.passes(x0, feed.job.width, feed.job.height)
            if not feed.passed:
                picture = blurred(picture)
        # Few operations: each takes the interpreter's lock, which the denoiser's thread needs back.
        pixels = picture[0].permute(1, 2, 0).mul(255).round_().clamp_(0, 255).to("cpu", torch.uint8).contiguous()
        height, width, _ = pixels.shape
        return Pixels(width, height, pixels.numpy().tobytes())

    def _give_up(self, feed: PreviewQueue, due: PendingPreview, error: BaseException) -> None:
        feed.context.run(_log.error, "preview failed", step=due.step.number, method=due.method, exc_info=error)
        self._observe(PreviewFailed())
        feed.failed()
        _report(feed, due, None)


def _is_finite(feed: PreviewQueue, due: PendingPreview, x0: torch.Tensor) -> bool:
    if _all_finite(x0):
        return True
    # At zero signal, x0 of an epsilon model may be infinite; the latents themselves must not be.
    feed.broken = not (_all_finite(due.step.sample) and _all_finite(due.step.model_output))
    return False


def _all_finite(numbers: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity: then the sum is finite, which takes one operation to know."""
    return math.isfinite(float(numbers.sum(dtype=torch.float32)))


def _report(feed: PreviewQueue, due: PendingPreview, image: Pixels | None) -> None:
    step, lost = due.step, feed.lost()
    try:
        if image is None:
            feed.report(Denoising(step.number, step.total, lost))
        else:
            feed.report(PreviewReady(step.number, step.total, image, due.method, lost))
    except Exception:
        # One generation's trouble; the thread works for all of them.
        feed.context.run(_log.exception, "preview cannot be reported")
    finally:
        feed.done()
