"""The engine: a diffusers pipeline behind the protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server import errors
from calotype_server.engine.capabilities import Defaults, describe, tokenizers
from calotype_server.engine.preview.cache import cache_path, load_head, save_head
from calotype_server.engine.preview.calibrate import calibrate
from calotype_server.engine.preview.renderer import PreviewRenderer
from calotype_server.engine.probe import pick_threads
from calotype_server.engine.tap import Step, StepTap, Stopped
from calotype_server.engine.view import make_scheduler, request_view
from calotype_server.types import Decoding, Denoising, EncodingPrompt, Event, Notice, Pixels

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

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
        threads: Threads that torch computes with; None to measure what is quickest.
    """

    def __init__(
        self, name: str, pipeline: Any, *, defaults: Defaults, cache_dir: Path, threads: int | None = None
    ) -> None:
        self._pipeline = pipeline
        self._model = describe(name, pipeline, defaults)
        self._threads = threads or pick_threads(pipeline, self._model)
        _log.info("model loaded", model=name, device=self._model.device, threads=self._threads)
        self._renderer = _make_renderer(pipeline, self._model, cache_dir)

    @property
    def model(self) -> ModelInfo:
        """What the model can do and does by default."""
        return self._model

    def run(self, job: Job, report: Callable[[Event], None], stop: threading.Event) -> Pixels:
        """Generates one picture; see the protocol."""
        # Torch keeps the setting by thread, and new threads take whatever was set last anywhere.
        torch.set_num_threads(self._threads)
        feed = self._renderer.feed(job, report) if self._renderer is not None else None

        def on_step(step: Step) -> None:
            if feed is None:
                report(Denoising(step.number, step.total))
            else:
                feed.offer(step)
            if step.number >= step.total:
                report(Decoding())

        scheduler = make_scheduler(self._pipeline, job.scheduler)
        StepTap(
            scheduler,
            on_start=lambda total: report(Denoising(0, total)),
            on_step=on_step,
            should_stop=lambda: stop.is_set() or (feed is not None and feed.broken),
        )
        try:
            report(EncodingPrompt(self._notices(job)))
            output = request_view(self._pipeline, scheduler)(**self._arguments(job))
            return _to_pixels(output[0])
        except Stopped:
            if not stop.is_set():
                raise _numerical_failure() from None
            raise errors.Cancelled("The generation was cancelled.") from None
        except (torch.OutOfMemoryError, MemoryError):
            torch.cuda.empty_cache()
            raise errors.OutOfMemory("The device ran out of memory; a smaller picture may fit.") from None
        except torch.AcceleratorError as error:
            _log.exception("the device failed")
            raise errors.EngineDead("The device failed.") from error
        except errors.ServiceError:
            raise
        except Exception as error:
            if "DefaultCPUAllocator" in str(error):
                # Torch has a type of its own for the memory of devices only.
                raise errors.OutOfMemory("Memory ran out; a smaller picture may fit.") from None
            _log.exception("the pipeline failed")
            raise errors.GenerationFailed("The model could not make this picture.") from error
        finally:
            if feed is not None:
                feed.close()

    def close(self) -> None:
        """Ends the preview thread."""
        if self._renderer is not None:
            self._renderer.close()

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


def _make_renderer(pipeline: Any, model: ModelInfo, cache_dir: Path) -> PreviewRenderer | None:
    """Loads or calibrates the head. A pipeline that cannot be calibrated still works, with progress but no pictures."""
    path = cache_path(cache_dir, pipeline)
    head = load_head(path)
    if head is None:
        _log.info("calibrating previews", model=model.name)
        try:
            head = calibrate(pipeline, model)
        except Exception:
            _log.exception("previews cannot be calibrated for this pipeline; it will show progress without pictures")
            return None
        save_head(path, head)
    return PreviewRenderer(head)


def _to_pixels(images: Any) -> Pixels:
    """The first of (batch, 3, height, width) from 0 to 1, rounded as diffusers does for PIL."""
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
