"""GenerationRun: takes one job through the pipeline, from the prompt to the final image."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from calotype_server import errors
from calotype_server.engine.batching.run_ahead import RunAhead
from calotype_server.engine.prompts.encoding import read_weights
from calotype_server.engine.requests.arguments import call_arguments, prompt_notices
from calotype_server.engine.requests.lora_tags import lora_tag_notices
from calotype_server.engine.requests.processors import restored_processors
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.engine.schedulers.noise import draw_noise_from
from calotype_server.engine.step_cache.cache import StepCache
from calotype_server.engine.step_cache.direct import cached_proxy
from calotype_server.engine.stepping.host_timesteps import keep_timesteps_on_host
from calotype_server.engine.tap import Step, StepTap, Stopped
from calotype_server.failpoints import hit
from calotype_server.types import (
    Decoding,
    Denoising,
    EncodingPrompt,
    Pixels,
    PreviewMethod,
    PromptSyntax,
    Speed,
    Withdrawn,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calotype_server.engine.adapters.loras import Loras
    from calotype_server.engine.batching.batcher import StepBatcher
    from calotype_server.engine.batching.session import DenoiserSession
    from calotype_server.engine.early_finish import EarlyFinisher
    from calotype_server.engine.preview.budget import PreviewBudget
    from calotype_server.engine.preview.device_stream import Lap
    from calotype_server.engine.preview.pipeline_previews import PipelinePreviews
    from calotype_server.engine.preview.queue import PreviewQueue
    from calotype_server.engine.protocol import Stop
    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.engine.stepping.step_reports import StepReports
    from calotype_server.types import Job, ModelInfo

__all__ = ["EngineParts", "GenerationRun", "to_pixels"]


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
        batcher: Runs the denoiser for all requests; None if pipelines must call it themselves, one after another.
        runtime: Computes the denoiser for the batcher.
        threads: CPU threads for everything but a shared denoiser.
        host_timesteps: Whether schedulers get their timesteps in ordinary memory.
        loras: LoRAs that requests choose by name; None if there are none.
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
    host_timesteps: bool = False
    loras: Loras | None = None


class GenerationRun:
    """One job on its way through the pipeline. Call `run` once.

    Args:
        parts: The engine's parts.
        job: What to generate.
        reports: Receives events; see `engine.protocol.Engine.run`.
        stop: Asks the run to end.
        queue: Receives the steps to preview.
    """

    def __init__(self, parts: EngineParts, job: Job, reports: StepReports, stop: Stop, queue: PreviewQueue) -> None:
        self._parts = parts
        self._job = job
        self._report = reports
        self._stop = stop
        self._queue = queue
        self._session: DenoiserSession | None = None
        self._cache = StepCache() if job.speed is Speed.FAST else None
        self._loras = tuple(lora for lora in job.loras if lora.scale)
        self._decoding: Lap | None = None
        self._run_ahead: RunAhead | None = None

    def run(self) -> Pixels:
        """Calls the pipeline, and returns the image after all steps, or after fewer if asked to finish early.

        Raises:
            Cancelled: The run was asked to stop.
            NumericalFailure: The latents or the image hold NaN or infinity.
            ContentWithheld: The safety checker rejected the image.
        """
        job = self._job
        arguments = call_arguments(self._parts.pipeline, job)
        scheduler = make_scheduler(self._parts.pipeline, job.scheduler, job.sigmas, job.spacing)
        draw_noise_from(scheduler, arguments["generator"], job.seed)
        tap = StepTap(
            scheduler,
            on_start=self._on_start,
            on_step=self._on_step,
            should_stop=self._should_stop,
            settle=None if self._cache is None else self._cache.settle,
        )
        if self._parts.host_timesteps:
            keep_timesteps_on_host(scheduler)
        view = self._open_view(scheduler)
        if job.prompt_syntax is PromptSyntax.WEIGHTED:
            read_weights(view)
        try:
            if self._should_stop():
                raise Stopped
            notices = (*prompt_notices(self._parts.pipeline, job), *lora_tag_notices(job))
            self._report(EncodingPrompt(notices))
            denoiser = getattr(self._parts.pipeline, self._parts.denoiser)
            with self._session or restored_processors(denoiser), self._with_loras():
                output = view(**arguments)
            return self._complete(tap.last, output)
        except Stopped:
            return self._finish_early(tap.last)

    def _open_view(self, scheduler: Any) -> Any:
        """Returns the request's view of the pipeline, and opens a session with a shared denoiser."""
        parts = self._parts
        if parts.batcher is None:
            own = {}
            if self._cache is not None:
                own[parts.denoiser] = cached_proxy(getattr(parts.pipeline, parts.denoiser), self._cache)
            return request_view(parts.pipeline, scheduler, **own)
        self._session = parts.batcher.open_session(
            should_stop=self._should_stop, on_submitted=self._report.flush, cache=self._cache, loras=self._loras
        )
        self._report.hold()
        self._stop.call(self._session.cancel)
        return request_view(parts.pipeline, scheduler, **{parts.denoiser: self._session.proxy()})

    @contextlib.contextmanager
    def _with_loras(self) -> Iterator[None]:
        """Applies the request's LoRAs to its prompts, and to a denoiser that its pipeline calls itself."""
        loras = self._parts.loras
        if loras is None:
            yield
            return
        own_denoiser = self._parts.batcher is None
        with loras.in_encoders(self._loras), loras.in_whole_denoiser(self._loras if own_denoiser else ()):
            yield

    def _should_stop(self) -> bool:
        return self._stop.is_set() or self._queue.invalid

    def _on_start(self, total: int) -> None:
        if self._cache is not None:
            self._cache.start(total)
        self._report(Denoising(0, total))

    def _on_step(self, step: Step) -> None:
        hit("engine.step")
        if self._session is None:
            self._limit_run_ahead(step)
        elif step.number == 1:
            self._session.note_look()
        self._queue.offer(step)
        if step.number >= step.total:
            if self._session is not None:
                self._session.expect_no_more()
            self._decoding = self._parts.previews.start_decoding()
            self._report(self._decoding_event(step))
        elif self._stop.finishing and step.x0() is not None:
            raise Stopped

    def _limit_run_ahead(self, step: Step) -> None:
        """Waits until the step before is computed. A shared denoiser does so for all its calls."""
        if self._run_ahead is None:
            # Modules that are moved between devices are elsewhere before the first step.
            self._run_ahead = RunAhead(step.sample.device)
        self._run_ahead.launched()
        self._run_ahead.limit()

    def _decoding_event(self, last: Step | None, *, early: bool = False, seconds: float = 0.0) -> Decoding:
        return Decoding(
            finished_early=early,
            batch_rows=0.0 if self._session is None else self._session.mean_rows,
            computed_steps=self._computed_steps(last),
            seconds=seconds,
        )

    def _computed_steps(self, last: Step | None) -> int:
        if self._cache is not None:
            return self._cache.computed_steps
        return 0 if last is None else last.number

    def _complete(self, last: Step | None, output: Any) -> Pixels:
        """Returns the image of a pipeline's call that took all steps."""
        if self._decoding is not None:
            self._decoding.stop()
        pixels = to_pixels(output[0])
        self._note_decoding(last)
        self._queue.flush()
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise self._withhold()
        if last is not None:
            self._parts.previews.learn(last, output[0])
        return pixels

    def _note_decoding(self, last: Step | None) -> None:
        """Records how long the image took to decode. Call it when the pixels are on the host."""
        if self._decoding is None:
            return
        seconds = self._decoding.computing_seconds(self._parts.threads)
        self._parts.budget.observe_decode(PreviewMethod.FULL_VAE, seconds, self._job.pixel_count)
        on_device = self._decoding.device_seconds()
        if on_device is not None:
            # The first report was made when the last step was launched, not when it was computed.
            self._report(self._decoding_event(last, seconds=on_device))

    def _finish_early(self, last: Step | None) -> Pixels:
        """Returns the predicted image of the last step, if the caller asked for that, or raises why the run stopped."""
        if self._stop.is_set():
            raise errors.Cancelled("The generation was cancelled.") from None
        if self._queue.invalid or last is None:
            raise _numerical_failure() from None
        self._report(self._decoding_event(last, early=True))
        images = self._parts.finisher.decode(last, self._job.width, self._job.height)
        self._queue.flush()
        if images is None:
            raise self._withhold()
        pixels = to_pixels(images)
        self._parts.previews.learn(last, images)
        return pixels

    def _withhold(self) -> errors.ContentWithheld:
        """Withdraws the previews, and returns the error to raise."""
        self._report(Withdrawn())
        return errors.ContentWithheld("The model's safety checker rejected this image. Try another seed.")


def to_pixels(images: Any) -> Pixels:
    """Returns the first of (batch, 3, height, width), 0 to 1, rounded as diffusers does for PIL.

    The device does all the work, and a single copy leaves it: on CUDA, each read also waits for all steps of other
    requests that were launched before it.

    Raises:
        NumericalFailure: The image has NaN or infinity.
    """
    image = images[0].float()
    _, height, width = image.shape
    # Any NaN or infinity makes the sum one. On a CPU, `isfinite(image)` takes as long as the rest of the conversion.
    is_finite = torch.isfinite(image.sum())
    levels = (image * 255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)
    data = torch.cat([is_finite.to(torch.uint8).reshape(1), levels.flatten()]).cpu().numpy()
    if not data[0]:
        raise _numerical_failure()
    return Pixels(width, height, data[1:].tobytes())


def _numerical_failure() -> errors.NumericalFailure:
    return errors.NumericalFailure(
        "The model produced invalid numbers. Another seed, scheduler or a lower guidance scale may help."
    )
