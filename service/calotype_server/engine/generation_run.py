"""GenerationRun: takes one job through the pipeline, from the prompt to the final image."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from calotype_server import errors
from calotype_server.engine.request_arguments import call_arguments, prompt_notices
from calotype_server.engine.request_view import make_scheduler, request_view
from calotype_server.engine.tap import Step, StepTap, Stopped
from calotype_server.failpoints import hit
from calotype_server.types import Decoding, Denoising, EncodingPrompt, Event, Pixels, PreviewMethod, Withdrawn

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.engine.batching.batcher import StepBatcher
    from calotype_server.engine.batching.session import DenoiserSession
    from calotype_server.engine.early_finish import EarlyFinisher
    from calotype_server.engine.preview.budget import PreviewBudget
    from calotype_server.engine.preview.pipeline_previews import PipelinePreviews
    from calotype_server.engine.preview.queue import PreviewQueue
    from calotype_server.engine.protocol import Stop
    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.types import Job, ModelInfo

__all__ = ["EngineParts", "GenerationRun"]


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The parts of an engine, which all its generations share.

    Attributes:
        pipeline: The pipeline that views of requests are made from.
        denoiser: Name of the pipeline's attribute that holds the denoiser.
        model: Its description.
        previews: Renders previews.
        finisher: Decodes the image of a generation that ends early.
        budget: Records how long the full VAE takes.
        batcher: Runs the denoiser for all requests; None if only one runs at a time.
        runtime: Computes the denoiser for the batcher.
        threads: CPU threads for everything but a shared denoiser.
    """

    pipeline: Any
    denoiser: str
    model: ModelInfo
    previews: PipelinePreviews
    finisher: EarlyFinisher
    budget: PreviewBudget
    batcher: StepBatcher | None
    runtime: DenoiserRuntime
    threads: int


class GenerationRun:
    """One job on its way through the pipeline. Call `run` once.

    Args:
        parts: The engine's parts.
        job: What to generate.
        report: Receives events; see `engine.protocol.Engine.run`.
        stop: Asks the run to end.
        queue: Receives the steps to preview.
    """

    def __init__(
        self, parts: EngineParts, job: Job, report: Callable[[Event], None], stop: Stop, queue: PreviewQueue
    ) -> None:
        self._parts = parts
        self._job = job
        self._report = report
        self._stop = stop
        self._queue = queue
        self._session: DenoiserSession | None = None
        self._decoding_since = 0.0

    def run(self) -> Pixels:
        """Calls the pipeline, and returns the image after all steps, or after fewer if asked to finish early.

        Raises:
            Cancelled: The run was asked to stop.
            NumericalFailure: The latents or the image hold NaN or infinity.
            ContentWithheld: The safety checker rejected the image.
        """
        scheduler = make_scheduler(self._parts.pipeline, self._job.scheduler)
        tap = StepTap(
            scheduler,
            on_start=lambda total: self._report(Denoising(0, total)),
            on_step=self._on_step,
            should_stop=self._should_stop,
        )
        view = self._open_view(scheduler)
        try:
            if self._should_stop():
                raise Stopped
            self._report(EncodingPrompt(prompt_notices(self._parts.pipeline, self._job)))
            with self._session or contextlib.nullcontext():
                output = view(**call_arguments(self._parts.pipeline, self._job))
            return self._complete(tap.last, output)
        except Stopped:
            return self._finish_early(tap.last)

    def _open_view(self, scheduler: Any) -> Any:
        """Returns the request's view of the pipeline, and opens a session with a shared denoiser."""
        parts = self._parts
        if parts.batcher is None:
            return request_view(parts.pipeline, scheduler)
        self._session = parts.batcher.open_session(should_stop=self._should_stop)
        self._stop.call(self._session.cancel)
        return request_view(parts.pipeline, scheduler, **{parts.denoiser: self._session.proxy()})

    def _should_stop(self) -> bool:
        return self._stop.is_set() or self._queue.invalid

    def _on_step(self, step: Step) -> None:
        hit("engine.step")
        self._queue.offer(step)
        if step.number >= step.total:
            if self._session is not None:
                self._session.expect_no_more()
            self._decoding_since = time.perf_counter()
            self._report(Decoding(batch_rows=self._mean_rows()))
        elif self._stop.finishing and step.x0() is not None:
            raise Stopped

    def _mean_rows(self) -> float:
        return 0.0 if self._session is None else self._session.mean_rows

    def _complete(self, last: Step | None, output: Any) -> Pixels:
        """Returns the image of a pipeline's call that took all steps."""
        pixels = _to_pixels(output[0])
        seconds = (time.perf_counter() - self._decoding_since) * self._parts.threads
        self._parts.budget.observe_decode(PreviewMethod.FULL_VAE, seconds, self._job.pixel_count)
        self._queue.flush()
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise self._withhold()
        if last is not None:
            self._parts.previews.learn(last, output[0])
        return pixels

    def _finish_early(self, last: Step | None) -> Pixels:
        """Returns the predicted image of the last step, if the caller asked for that, or raises why the run stopped."""
        if self._stop.is_set():
            raise errors.Cancelled("The generation was cancelled.") from None
        if self._queue.invalid or last is None:
            raise _numerical_failure() from None
        self._report(Decoding(finished_early=True, batch_rows=self._mean_rows()))
        images = self._parts.finisher.decode(last, self._job.width, self._job.height)
        self._queue.flush()
        if images is None:
            raise self._withhold()
        pixels = _to_pixels(images)
        self._parts.previews.learn(last, images)
        return pixels

    def _withhold(self) -> errors.ContentWithheld:
        """Withdraws the previews, and returns the error to raise."""
        self._report(Withdrawn())
        return errors.ContentWithheld("The model's safety checker rejected this image. Try another seed.")


def _to_pixels(images: Any) -> Pixels:
    """Returns the first of (batch, 3, height, width), 0 to 1, rounded as diffusers does for PIL."""
    image = images[0].float()
    if not torch.isfinite(image).all():
        raise _numerical_failure()
    rounded = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().contiguous()
    height, width, _ = rounded.shape
    return Pixels(width, height, rounded.numpy().tobytes())


def _numerical_failure() -> errors.NumericalFailure:
    return errors.NumericalFailure(
        "The model produced invalid numbers. Another seed, scheduler or a lower guidance scale may help."
    )
