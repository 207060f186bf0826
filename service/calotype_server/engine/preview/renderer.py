"""The preview thread: renders finished steps without delaying the denoiser."""

from __future__ import annotations

import contextvars
import functools
import math
import threading
from collections import deque
from typing import TYPE_CHECKING

import structlog
import torch

from calotype_server.engine.preview.drawing import draw, to_pixels
from calotype_server.engine.preview.queue import PreviewQueue
from calotype_server.engine.preview.safety_gate import blurred
from calotype_server.failpoints import hit
from calotype_server.observability.events import Observe, PreviewFailed, PreviewRendered, ignore
from calotype_server.threads import start
from calotype_server.types import Denoising, Event, PreviewReady

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from calotype_server.engine.preview.budget import PreviewBudget
    from calotype_server.engine.preview.decoders import Decoder
    from calotype_server.engine.preview.device_stream import DeviceStream
    from calotype_server.engine.preview.queue import PendingPreview
    from calotype_server.engine.preview.safety_gate import SafetyGate
    from calotype_server.types import Job, Pixels, PreviewMethod

__all__ = ["PreviewRenderer"]

_log = structlog.get_logger(__name__)

_MAX_IDLE_TASKS = 8


class PreviewRenderer:
    """A thread that renders due steps. Steps of the same kind that are due together form one batch.

    Args:
        decoders: The available decoders.
        budget: Records how long decoders take.
        stream: Where previews are computed.
        gate: Approves a generation's sharp previews; None if the pipeline has no safety checker.
        observe: Receives observations of steps and previews.
    """

    def __init__(
        self,
        decoders: Mapping[PreviewMethod, Decoder],
        budget: PreviewBudget,
        stream: DeviceStream,
        gate: SafetyGate | None = None,
        observe: Observe = ignore,
    ) -> None:
        self._decoders = decoders
        self._budget = budget
        self._stream = stream
        self._gate = gate
        self._observe = observe
        self._open: set[PreviewQueue] = set()
        self._changed = threading.Condition()
        self._due: deque[PreviewQueue] = deque()
        self._idle_tasks: deque[Callable[[], None]] = deque()
        self._closed = False
        self._thread = start("preview", self._run)

    def open_queue(self, job: Job, report: Callable[[Event], None]) -> PreviewQueue:
        """Opens a queue for one generation; `report` receives its progress and previews."""
        queue = PreviewQueue(
            job,
            report,
            methods=self._decoders.keys(),
            budget=self._budget,
            stream=self._stream,
            open_queues=lambda: len(self._open),
            on_due=self._enqueue,
            on_close=self._open.discard,
            observe=self._observe,
        )
        self._open.add(queue)
        return queue

    def when_idle(self, task: Callable[[], None]) -> None:
        """Runs `task` on the preview thread when no step is due. If too many tasks wait, it is dropped."""
        with self._changed:
            if len(self._idle_tasks) < _MAX_IDLE_TASKS:
                # In the caller's context, so that the lines it logs carry the caller's ids.
                self._idle_tasks.append(functools.partial(contextvars.copy_context().run, task))
                self._changed.notify()

    def close(self) -> None:
        """Renders all steps that are due, then ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, queue: PreviewQueue) -> None:
        with self._changed:
            self._due.append(queue)
            self._changed.notify()

    def _run(self) -> None:
        """Serves until `close`. No exception of any class ends the thread, because all generations wait for it."""
        # The other cores belong to the denoiser. Torch keeps the number per thread.
        torch.set_num_threads(1)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._idle_tasks or self._closed)
                queues = list(self._due)
                self._due.clear()
                task = self._idle_tasks.popleft() if not queues and self._idle_tasks else None
            if queues:
                try:
                    self._serve(queues)
                except BaseException:
                    _log.exception("previews failed")
                    for queue in queues:
                        queue.take()
                        queue.done()
            elif task is not None:
                try:
                    task()
                except BaseException:
                    _log.exception("the preview head cannot learn from an image")
            else:
                return

    def _serve(self, queues: Sequence[PreviewQueue]) -> None:
        groups: dict[tuple[object, ...], list[tuple[PreviewQueue, PendingPreview]]] = {}
        for queue in queues:
            pending = queue.take()
            if pending is not None:
                kind = (pending.method, pending.step.sample.shape[1:], queue.job.width, queue.job.height)
                groups.setdefault(kind, []).append((queue, pending))
        for group in groups.values():
            try:
                self._render_in_context(group)
            except BaseException as error:
                if len(group) == 1:
                    self._fail(*group[0], error)
                    continue
                # One member makes the batch fail. Rendering each alone keeps the previews of the others.
                for member in group:
                    try:
                        self._render_in_context([member])
                    except BaseException as own:
                        self._fail(*member, own)

    def _render_in_context(self, group: Sequence[tuple[PreviewQueue, PendingPreview]]) -> None:
        """Renders in the context of the first member: lines that a decoder logs carry its ids."""
        hit("engine.preview")
        group[0][0].context.copy().run(self._render, group)

    def _render(self, group: Sequence[tuple[PreviewQueue, PendingPreview]]) -> None:
        """Renders and reports steps of one kind. If it raises, nothing has been reported."""
        method, job = group[0][1].method, group[0][0].job
        unchecked = sum(queue.safe is None for queue, _ in group)
        with torch.no_grad(), self._stream.after([pending.launched for _, pending in group]) as elapsed:
            predictions = [pending.step.x0() for _, pending in group]
            known = [(member, x0) for member, x0 in zip(group, predictions, strict=True) if x0 is not None]
            drawn = iter(self._draw(method, known) if known else ())
            images = [None if x0 is None else next(drawn) for x0 in predictions]
        for _ in known:
            self._observe(PreviewRendered(method, elapsed.seconds / len(known)))
        if known and unchecked == sum(queue.safe is None for queue, _ in group):
            # Not if the safety checker ran: its time is spent once in a generation.
            self._budget.observe_decode(method, elapsed.seconds / len(known), job.pixel_count)
        for (queue, pending), x0, image in zip(group, predictions, images, strict=True):
            if x0 is not None and image is None:
                queue.skip()
            _report(queue, pending, image)

    def _draw(
        self, method: PreviewMethod, known: Sequence[tuple[tuple[PreviewQueue, PendingPreview], torch.Tensor]]
    ) -> list[Pixels | None]:
        """Returns the pixels of each member; None if they hold NaN or infinity."""
        job = known[0][0][0].job
        drawing = draw(self._decoders[method], torch.cat([x0 for _, x0 in known]), job.width, job.height)
        drawn: list[Pixels | None] = [None] * len(known)
        shown = []
        for row, (finite, finite_image) in enumerate(drawing.finite()):
            if not finite:
                _check_latents(*known[row][0])
            elif finite_image:
                shown.append(row)
        if self._gate is not None:
            for row in shown:
                (queue, pending), x0 = known[row]
                (drawn[row],) = to_pixels(self._gated(self._gate, queue, pending, x0, drawing.images[row : row + 1]))
        elif shown:
            images = drawing.images if len(shown) == len(known) else drawing.images[shown]
            for row, pixels in zip(shown, to_pixels(images), strict=True):
                drawn[row] = pixels
        return drawn

    def _gated(
        self, gate: SafetyGate, queue: PreviewQueue, pending: PendingPreview, x0: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor:
        """Returns the image, blurred until the safety checker has approved the prediction."""
        if queue.safe is None and 2 * pending.step.number >= pending.step.total:
            queue.record_verdict(gate.passes(x0, queue.job.width, queue.job.height))
        return image if queue.safe else blurred(image)

    def _fail(self, queue: PreviewQueue, pending: PendingPreview, error: BaseException) -> None:
        queue.context.run(_log.error, "preview failed", step=pending.step.number, method=pending.method, exc_info=error)
        self._observe(PreviewFailed())
        queue.skip()
        _report(queue, pending, None)


def _check_latents(queue: PreviewQueue, pending: PendingPreview) -> None:
    """Ends a generation whose latents hold NaN or infinity.

    At zero signal, x0 of an epsilon model may be infinite; the latents themselves must not be.
    """
    latents = (pending.step.sample, pending.step.model_output)
    if not all(math.isfinite(float(each.sum(dtype=torch.float32))) for each in latents):
        queue.mark_invalid()


def _report(queue: PreviewQueue, pending: PendingPreview, image: Pixels | None) -> None:
    step, skipped = pending.step, queue.take_skipped()
    try:
        if image is None:
            queue.report(Denoising(step.number, step.total, skipped))
        else:
            queue.report(PreviewReady(step.number, step.total, image, pending.method, skipped))
    except BaseException:
        # Exceptions of any class affect one generation only; the thread works for all of them.
        queue.context.run(_log.exception, "preview cannot be reported")
    finally:
        queue.done()
