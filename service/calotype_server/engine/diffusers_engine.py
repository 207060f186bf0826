"""The engine: a diffusers pipeline behind the protocol."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server import errors
from calotype_server.engine.batching.batcher import StepBatcher, is_out_of_memory
from calotype_server.engine.batching.plan import make_plan
from calotype_server.engine.capabilities import Defaults, denoiser_name, describe, tokenizers
from calotype_server.engine.early_finish import Finisher
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.engine.preview.pipeline_previews import PipelinePreviews
from calotype_server.engine.request_view import make_scheduler, request_view
from calotype_server.engine.sample_calls import pick_threads
from calotype_server.engine.shared_components import shared_components
from calotype_server.engine.tap import Step, StepTap, Stopped
from calotype_server.observability.events import BatchDone, Observe, ignore
from calotype_server.types import Decoding, Denoising, EncodingPrompt, Event, Notice, Pixels, PreviewMethod, Withdrawn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from calotype_server.engine.batching.batcher import BatchRecord
    from calotype_server.engine.preview.queue import PreviewQueue
    from calotype_server.engine.protocol import Stop
    from calotype_server.types import Job, ModelInfo

__all__ = ["DiffusersEngine"]

_log = structlog.get_logger(__name__)


class DiffusersEngine:
    """Runs jobs on one pipeline; see `engine.protocol.Engine`.

    Args:
        name: The model's name, for people.
        pipeline: A loaded text-to-image pipeline; it is never changed.
        defaults: What takes precedence over the pipeline's own defaults.
        cache_dir: Folder for the calibrated preview head.
        threads: Threads that torch computes with; None to measure what is quickest, or when `deterministic` for all.
        budget: Chooses how previews are drawn.
        preview_methods: What the operator allows to draw them.
        tiny_vae: An `AutoencoderTiny` that fits the pipeline, or None.
        max_active: Generations at work at once; None to measure what pays.
        max_rows: Rows of latents that the denoiser computes together at most; None to measure what pays.
        deterministic: Whether a picture must be bitwise the same in any company.
        on_batch: Told of every call of a shared denoiser; it must not block.
        observe: Told what there is to see.
    """

    def __init__(
        self,
        name: str,
        pipeline: Any,
        *,
        defaults: Defaults,
        cache_dir: Path,
        threads: int | None = None,
        budget: PreviewBudget | None = None,
        preview_methods: Collection[PreviewMethod] = tuple(PreviewMethod),
        tiny_vae: Any = None,
        max_active: int | None = 1,
        max_rows: int | None = None,
        deterministic: bool = False,
        on_batch: Callable[[BatchRecord], None] | None = None,
        observe: Observe = ignore,
    ) -> None:
        def batch_done(record: BatchRecord) -> None:
            observe(BatchDone(record.rows, record.seconds))
            if on_batch is not None:
                on_batch(record)

        model = describe(name, pipeline, defaults)
        self._denoiser = denoiser_name(pipeline)
        most_threads = threads or torch.get_num_threads()
        few_threads = most_threads if threads or deterministic else pick_threads(pipeline, model)
        _log.info("model loaded", model=name, device=model.device, threads=few_threads)
        torch.set_num_threads(few_threads)
        plan = make_plan(
            pipeline,
            model,
            max_active=max_active,
            threads=(few_threads, most_threads),
            max_rows=max_rows,
            deterministic=deterministic,
        )
        # Beside the denoiser a generation reads its prompt and decodes its picture: enough work for all threads.
        self._threads = few_threads if plan.max_rows == 0 else most_threads
        computing = few_threads if plan.threads is None else plan.threads.of(plan.max_rows)
        _log.info(
            "concurrency",
            max_active=plan.max_active,
            max_rows=plan.max_rows,
            threads=computing,
            unbatched=plan.reason or None,
        )
        self._batcher: StepBatcher | None = None
        shared = shared_components(pipeline)
        if plan.max_rows == 0:
            # With one generation at a time, the hooks of offloading may do their work.
            del shared["_all_hooks"]
        else:
            self._batcher = StepBatcher(
                getattr(pipeline, self._denoiser),
                max_rows=plan.max_rows,
                threads=plan.threads,
                deterministic=deterministic and not plan.reason,
                on_batch=batch_done,
            )
            # For the previews, which may ask the denoiser too, about shapes.
            shared[self._denoiser] = self._batcher.stream().proxy()
        self._pipeline = request_view(pipeline, pipeline.scheduler, **shared)
        self._budget = budget or PreviewBudget(share=0.02)
        if model.device == "cpu":
            self._budget.contention = min(1.0, computing / (os.cpu_count() or 1))
        self._previews = PipelinePreviews(
            self._pipeline,
            model,
            cache_dir=cache_dir,
            allowed=preview_methods,
            budget=self._budget,
            tiny_vae=tiny_vae,
            observe=observe,
            teachable=not deterministic,
        )
        own = {} if self._batcher is None else {self._denoiser: self._batcher.stream().proxy()}
        self._finisher = Finisher(request_view(self._pipeline, pipeline.scheduler, **own))
        self._model = replace(
            model,
            preview_methods=self._previews.methods,
            max_active=plan.max_active,
            max_batch_rows=0 if plan.reason else plan.max_rows,
            unbatched_reason=plan.reason,
        )

    @property
    def model(self) -> ModelInfo:
        """What the model can do and does by default."""
        return self._model

    def run(self, job: Job, report: Callable[[Event], None], stop: Stop) -> Pixels:
        """Generates one picture; see the protocol."""
        # Torch keeps the setting by thread, and new threads take whatever was set last anywhere.
        torch.set_num_threads(self._threads)
        feed = self._previews.feed(job, report)
        try:
            return self._draw(job, report, stop, feed)
        except (torch.OutOfMemoryError, MemoryError):
            torch.cuda.empty_cache()
            raise errors.OutOfMemory("The device ran out of memory; a smaller picture may fit.") from None
        except torch.AcceleratorError as error:
            _log.exception("the device failed")
            raise errors.EngineDead("The device failed.") from error
        except errors.ServiceError:
            raise
        except BaseException as error:
            # Also what would end the process, such as SystemExit: it is one generation's trouble.
            if is_out_of_memory(error):
                raise errors.OutOfMemory("Memory ran out; a smaller picture may fit.") from None
            _log.exception("the pipeline failed")
            raise errors.GenerationFailed("The model could not make this picture.") from error
        finally:
            feed.close()

    def _draw(self, job: Job, report: Callable[[Event], None], stop: Stop, feed: PreviewQueue) -> Pixels:
        """Calls the pipeline, and sees it to one of its ends: all steps, enough of them, or told to stop."""
        decoding_since = 0.0

        def should_stop() -> bool:
            return stop.is_set() or feed.broken

        def on_step(step: Step) -> None:
            nonlocal decoding_since
            feed.offer(step)
            if step.number >= step.total:
                if stream is not None:
                    stream.expect_no_more()
                decoding_since = time.perf_counter()
                report(Decoding(batch_rows=rows()))
            elif stop.finishing and step.x0() is not None:
                raise Stopped

        def rows() -> float:
            return 0.0 if stream is None else stream.mean_rows

        scheduler = make_scheduler(self._pipeline, job.scheduler)
        tap = StepTap(
            scheduler,
            on_start=lambda total: report(Denoising(0, total)),
            on_step=on_step,
            should_stop=should_stop,
        )
        view, stream = request_view(self._pipeline, scheduler), None
        if self._batcher is not None:
            stream = self._batcher.stream(should_stop=should_stop)
            stop.call(stream.cancel)
            view = request_view(self._pipeline, scheduler, **{self._denoiser: stream.proxy()})
        try:
            if should_stop():
                raise Stopped
            report(EncodingPrompt(self._notices(job)))
            with stream or contextlib.nullcontext():
                output = view(**self._arguments(job))
            pixels = _to_pixels(output[0])
            self._budget.observe_decode(
                PreviewMethod.FULL_VAE, (time.perf_counter() - decoding_since) * self._threads, job.pixel_count
            )
            feed.flush()
            if any(getattr(output, "nsfw_content_detected", None) or ()):
                report(Withdrawn())
                raise _withheld()
            if tap.last is not None:
                self._previews.learn(tap.last, output[0])
            return pixels
        except Stopped:
            if stop.is_set():
                raise errors.Cancelled("The generation was cancelled.") from None
            if feed.broken or tap.last is None:
                raise _numerical_failure() from None
            report(Decoding(finished_early=True, batch_rows=rows()))
            return self._finish(job, tap.last, feed, report)

    def note_preview_encoding(self, seconds: float) -> None:
        """Charges the preview budget."""
        self._budget.observe_encode(seconds)

    def close(self) -> None:
        """Ends the preview thread and the device thread."""
        self._previews.close()
        if self._batcher is not None:
            self._batcher.close()

    def _finish(self, job: Job, step: Step, feed: PreviewQueue, report: Callable[[Event], None]) -> Pixels:
        """Decodes the predicted picture of a step as the final one."""
        images = self._finisher.decode(step, job.width, job.height)
        feed.flush()
        if images is None:
            report(Withdrawn())
            raise _withheld()
        pixels = _to_pixels(images)
        self._previews.learn(step, images)
        return pixels

    def _arguments(self, job: Job) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "prompt": job.prompt,
            "width": job.width,
            "height": job.height,
            "num_inference_steps": job.step_count,
            # On the CPU, so that a seed means the same picture on every device.
            "generator": torch.Generator().manual_seed(job.seed),
            "output_type": "pt",
        }
        if (
            job.step_count != 2
            and "intermediate_timesteps" in inspect.signature(type(self._pipeline).__call__).parameters
        ):
            # Sana-Sprint's default is the timestep between two steps, and with any other number of steps it insists on
            # none.
            arguments["intermediate_timesteps"] = None
        if job.negative_prompt is not None:
            arguments["negative_prompt"] = job.negative_prompt
        if job.guidance_scale is not None:
            arguments["guidance_scale"] = job.guidance_scale
        return arguments

    def _notices(self, job: Job) -> tuple[Notice, ...]:
        """Says so when no tokenizer of the pipeline reads the whole of a prompt."""
        found = tokenizers(self._pipeline)
        if not found:
            return ()
        tokenizer, limit = max(found, key=lambda each: each[1])
        notices = []
        for name, text in (("prompt", job.prompt), ("negative prompt", job.negative_prompt)):
            count = len(tokenizer(text, truncation=False)["input_ids"]) if text else 0
            if count > limit:
                message = f"The {name} has {count} tokens; the model read only the first {limit}."
                notices.append(Notice("PROMPT_TRUNCATED", message))
        return tuple(notices)


def _to_pixels(images: Any) -> Pixels:
    """The first of (batch, 3, height, width) from 0 to 1, rounded as diffusers does for PIL."""
    image = images[0].float()
    if not torch.isfinite(image).all():
        raise _numerical_failure()
    rounded = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().contiguous()
    height, width, _ = rounded.shape
    return Pixels(width, height, rounded.numpy().tobytes())


def _withheld() -> errors.ContentWithheld:
    return errors.ContentWithheld("The model's safety checker objects to this picture. Try another seed.")


def _numerical_failure() -> errors.NumericalFailure:
    return errors.NumericalFailure(
        "The model produced invalid numbers. Another seed, scheduler or a lower guidance scale may help."
    )
