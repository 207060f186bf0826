"""Tries a tiny pipeline: does the engine draw the images of the plain pipeline, alone, together and in its previews?"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import threading
import unittest.mock
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine import assembly
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.capabilities.guidance import read_guidance
from calotype_server.engine.generation_run import to_pixels
from calotype_server.engine.protocol import Stop
from calotype_server.errors import GenerationFailed, ServiceError
from calotype_server.types import Denoising, Job, Pixels, PreviewMethod, PreviewOptions, PreviewReady

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from calotype_server.engine.diffusers_engine import DiffusersEngine
    from calotype_server.types import ModelInfo

__all__ = ["SIZE", "Trial", "job_of", "small", "small_engine", "try_pipeline", "without_effect"]

SIZE = 64
"""Width and height of the images, in pixels. Some pipelines need more; see `side_of`."""

_PROMPTS = ("a red apple", "two green pears")
_PATIENCE = 60.0
_MORE_GUIDANCE = 20.0
"""Enough for a tiny model to change a pixel."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """The result of a trial; differences are in levels of 255, and None if the images could not be drawn.

    Attributes:
        plain_difference: Largest difference between the engine's image and that of a plain call of the pipeline.
        preview_difference: Largest difference between the last preview, by the full VAE, and the image.
        together_difference: Largest difference between images that are drawn at the same time, and alone.
        unbatched_reason: Why requests do not share calls of the denoiser; empty if they do.
    """

    plain_difference: int | None
    preview_difference: int | None
    together_difference: int | None
    unbatched_reason: str


def small(pipeline: Any) -> Any:
    """Keeps a pipeline from rounding sizes to those of the real model, which are far too large here; returns it."""
    kind = type(pipeline)
    parameters = inspect.signature(kind.__call__).parameters
    fixed = {"use_resolution_binning": False, "max_area": SIZE * SIZE}
    fixed = {name: value for name, value in fixed.items() if name in parameters}
    if fixed:

        @functools.wraps(kind.__call__)
        def call(self: Any, **arguments: Any) -> Any:
            return kind.__call__(self, **{**arguments, **fixed})

        pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return pipeline


@contextlib.contextmanager
def small_engine(pipeline: Any, cache_dir: Path, **options: Any) -> Iterator[DiffusersEngine]:
    """Opens an engine whose default image is small, and that runs two generations at once."""

    def described(name: str, pipeline: Any, *options: Any) -> ModelInfo:
        model = describe(name, pipeline, *options)
        side = max(SIZE, model.size_multiple)
        return dataclasses.replace(model, width=side, height=side)

    options = {"max_active": 2, "max_rows": 8, "threads": 1, "preview_methods": (PreviewMethod.FULL_VAE,), **options}
    with unittest.mock.patch.object(assembly, "describe", described):
        engine = build_engine("tiny", small(pipeline), defaults=Defaults(), cache_dir=cache_dir, **options)
    try:
        yield engine
    finally:
        engine.close()


def job_of(model: ModelInfo, number: int = 0, **others: Any) -> Job:
    """Returns a request with the model's defaults and few steps; requests differ in prompt and seed."""
    job = Job(
        prompt=_PROMPTS[number],
        negative_prompt=None,
        width=model.width,
        height=model.height,
        # Sana-Sprint is made for two steps.
        step_count=min(model.step_count, 3),
        guidance_scale=model.guidance_scale,
        seed=number + 1,
        scheduler=model.scheduler,
        preview=PreviewOptions(method=PreviewMethod.NONE),
    )
    return dataclasses.replace(job, **others)


def try_pipeline(pipeline: Any, plain: Any, cache_dir: Path) -> Trial:
    """Draws images in every way, and compares them.

    Args:
        pipeline: A tiny pipeline that accepts prompts.
        plain: Another one with the same weights.
        cache_dir: Folder for batching plans.
    """
    try:
        with small_engine(pipeline, cache_dir) as engine:
            return _try_engine(engine, plain)
    except ServiceError as error:
        return Trial(None, None, None, type(error).__name__)


def _try_engine(engine: DiffusersEngine, plain: Any) -> Trial:
    jobs = [job_of(engine.model, number) for number in range(2)]
    # Without previews: the first of a size may be computed together with a step, which changes its last bits.
    drawn, other = (_draw(engine, job)[0] for job in jobs)
    previews = PreviewOptions(method=PreviewMethod.FULL_VAE, max_edge=10_000)
    previewed, last = _draw(engine, dataclasses.replace(jobs[0], preview=previews))
    return Trial(
        plain_difference=_difference(drawn, _plain_image(small(plain), jobs[0])),
        preview_difference=None if last is None else _difference(last, previewed),
        together_difference=_together_difference(engine, jobs, [drawn, other]),
        unbatched_reason=engine.model.unbatched_reason,
    )


def without_effect(engine: DiffusersEngine) -> list[str]:
    """Returns the parameters that the engine's model accepts, but that do not change the image."""
    model = engine.model
    job = job_of(model)
    step = max(16, model.size_multiple)
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": job.seed + 1},
        "step_count": {"step_count": job.step_count + 2},
        "width": {"width": job.width + step},
    }
    guided = job
    if model.guidance_scale is not None:
        changes["guidance_scale"] = {"guidance_scale": model.guidance_scale + _MORE_GUIDANCE}
        guided = dataclasses.replace(job, guidance_scale=model.guidance_scale + _MORE_GUIDANCE)
    base, _ = _draw(engine, job)
    found = [name for name, change in changes.items() if _draw(engine, dataclasses.replace(job, **change))[0] == base]
    if model.takes_negative_prompt:
        base = _draw(engine, guided)[0]
        if _draw(engine, dataclasses.replace(guided, negative_prompt="blurred"))[0] == base:
            found.append("negative_prompt")
    return found


def _draw(engine: DiffusersEngine, job: Job, start: threading.Barrier | None = None) -> tuple[Pixels, Pixels | None]:
    """Returns the image and the preview of the last step."""
    last: list[Pixels] = []

    def report(event: Any) -> None:
        if isinstance(event, Denoising) and event.step == 0 and start is not None:
            start.wait(_PATIENCE)
        if isinstance(event, PreviewReady) and event.step == event.total_steps:
            last.append(event.pixels)

    return engine.run(job, report, Stop()), last[-1] if last else None


def _together_difference(engine: DiffusersEngine, jobs: list[Job], alone: list[Pixels]) -> int | None:
    """Draws images at the same time; models that run alone draw them one after the other."""
    start = threading.Barrier(len(jobs)) if engine.model.max_active >= len(jobs) else None
    with concurrent.futures.ThreadPoolExecutor(len(jobs) if start else 1) as pool:
        runs = [pool.submit(_draw, engine, job, start) for job in jobs]
        try:
            together = [run.result(_PATIENCE)[0] for run in runs]
        except GenerationFailed:
            return None
    return max(map(_difference, together, alone))


@torch.no_grad()
def _plain_image(pipeline: Any, job: Job) -> Pixels:
    """Returns the image of a plain call with the pipeline's own defaults.

    Qwen-Image uses its default guidance only with a negative prompt, for which its authors recommend a space.
    """
    blank = {"negative_prompt": " "} if read_guidance(pipeline).parameter == "true_cfg_scale" else {}
    own = {}
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "guidance_schedule" in parameters:
        # Its default is for 48 steps only.
        own = {"guidance_schedule": (7.0,) * job.step_count}
    output = pipeline(
        prompt=job.prompt,
        width=job.width,
        height=job.height,
        num_inference_steps=job.step_count,
        generator=torch.Generator().manual_seed(job.seed),
        output_type="pt",
        **blank,
        **own,
    )
    return to_pixels(output[0])


def _difference(a: Pixels, b: Pixels) -> int:
    if (a.width, a.height) != (b.width, b.height):
        return 255
    levels = [torch.frombuffer(bytearray(each.data), dtype=torch.uint8).int() for each in (a, b)]
    return int((levels[0] - levels[1]).abs().max())
