"""Requests that run at the same time do not see each other's state, whichever component keeps it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.loading import LoadOptions, load_pipeline
from calotype_server.types import PreviewMethod, PreviewOptions, PreviewReady
from support.engine import tiny
from support.engine.families.hunyuan_folder import save_hunyuan_image
from support.runs import JOB, PATIENCE, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from calotype_server.engine.diffusers_engine import DiffusersEngine
    from calotype_server.types import Job, Pixels


@pytest.fixture
def open_engine(tmp_path: Path) -> Iterator[Callable[..., DiffusersEngine]]:
    """Builds engines that may run several requests, and closes them at the end."""
    opened: list[DiffusersEngine] = []

    def open_one(pipeline: Any, **options: Any) -> DiffusersEngine:
        options = {"max_active": 4, "max_rows": 8, "threads": 1, **options}
        opened.append(build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, **options))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()


def alone_and_together(engine: DiffusersEngine, jobs: Sequence[Job]) -> tuple[list[Pixels], list[Pixels]]:
    """Returns the images of jobs that run one after the other, and as many at once as the engine allows."""
    alone = [Run(engine)(job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(engine.model.max_active) as threads:
        together = [run.result(PATIENCE) for run in [threads.submit(Run(engine), job) for job in jobs]]
    return alone, together


def differences(alone: Sequence[Pixels], together: Sequence[Pixels]) -> list[int]:
    """Returns the largest difference of each pair of images, in steps of 1/255."""
    return [max(abs(x - y) for x, y in zip(a.data, b.data, strict=True)) for a, b in zip(alone, together, strict=True)]


def test_guiders_belong_to_a_request(tmp_path: Path, open_engine: Callable[..., DiffusersEngine]) -> None:
    """HunyuanImage's guiders keep a momentum: requests that run together still get the images that they get alone."""
    folder = save_hunyuan_image(tmp_path / "hunyuan")
    pipeline = load_pipeline(LoadOptions(model=str(folder)))
    # Smaller images and prompts than the model's, to save time. The template of prompts has 186 tokens here.
    pipeline.default_sample_size, pipeline.tokenizer_max_length = 8, 200
    engine = open_engine(pipeline)
    assert (engine.model.max_active, engine.model.unbatched_reason) == (4, "")
    job = dataclasses.replace(JOB, scheduler=engine.model.scheduler, guidance_scale=None, step_count=9, height=64)
    jobs = [dataclasses.replace(job, seed=len(prompt), prompt=prompt) for prompt in ("a", "two apples", "zzz")]
    assert max(differences(*alone_and_together(engine, jobs))) <= 1


class Remembering(diffusers.UNet2DConditionModel):
    """Adds a part of its last answer to the next one of the same run, as a step cache without hooks does."""

    last: Any = None
    last_timestep = 0.0

    def forward(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        (answer,) = super().forward(sample, timestep, *args, **{**kwargs, "return_dict": False})
        continues = timestep < self.last_timestep and self.last.shape == answer.shape
        remembered = answer + 0.1 * self.last if continues else answer
        self.last, self.last_timestep = answer, timestep
        return (remembered,)


def test_a_module_that_remembers_runs_one_request_at_a_time(open_engine: Callable[..., DiffusersEngine]) -> None:
    """If requests that take turns change each other's images, they run one after the other, and the reason is shown."""
    pipeline = tiny.build("sd15")
    pipeline.unet.__class__ = Remembering
    engine = open_engine(pipeline)
    assert engine.model.max_active == 1
    assert "keeps state between steps" in engine.model.unbatched_reason
    alone, together = alone_and_together(engine, [dataclasses.replace(JOB, seed=seed) for seed in range(3)])
    assert alone == together


def test_a_component_that_cannot_be_copied_runs_one_request_at_a_time(
    open_engine: Callable[..., DiffusersEngine],
) -> None:
    """Requests share a component that cannot be copied only one after the other, and the reason names it."""
    pipeline = tiny.build("sd15")
    pipeline.image_processor.lock = threading.Lock()
    engine = open_engine(pipeline)
    assert engine.model.max_active == 1
    assert engine.model.unbatched_reason == (
        "Its image_processor, a VaeImageProcessor, cannot be copied for each request, and may keep state."
    )


def pag() -> Any:
    """Returns a pipeline with perturbed attention guidance."""
    return diffusers.StableDiffusionPAGPipeline(
        **tiny.build("sd15").components, requires_safety_checker=False, pag_applied_layers="mid"
    )


@pytest.mark.parametrize("max_active", [4, 1])
def test_a_pipeline_that_changes_the_denoiser_runs_one_request_at_a_time(
    open_engine: Callable[..., DiffusersEngine], max_active: int
) -> None:
    """Perturbed attention guidance replaces attention processors: its requests run alone, with the same images."""
    pipeline = pag()
    engine = open_engine(pipeline, max_active=max_active)
    assert engine.model.max_active == 1
    if max_active > 1:
        assert engine.model.unbatched_reason == (
            "Its pipeline changes the denoiser during a generation (processor of Attention)."
        )
    jobs = [dataclasses.replace(JOB, seed=seed, guidance_scale=guidance) for seed, guidance in enumerate((5, 1, 5))]
    alone, together = alone_and_together(engine, jobs)
    assert alone == together
    expected = pag()(
        JOB.prompt,
        width=JOB.width,
        height=JOB.height,
        num_inference_steps=JOB.step_count,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )[0]
    pixels = (expected[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    assert together[0].data == pixels.numpy().tobytes()


def test_previews_do_not_call_a_denoiser_that_requests_change(
    open_engine: Callable[..., DiffusersEngine],
) -> None:
    """Every step has a preview, also of a size that is new, while the request's attention processors are in use."""
    engine = open_engine(pag())
    for width in (48, 80):
        run = Run(engine)
        run(dataclasses.replace(JOB, width=width, preview=PreviewOptions(method=PreviewMethod.FULL_VAE)))
        shown = [event for event in run.events if isinstance(event, PreviewReady)]
        assert shown[-1].step == JOB.step_count
        assert (shown[-1].pixels.width, shown[-1].pixels.height) == (width, JOB.height)


def test_a_cancelled_request_leaves_the_denoiser_as_it_was(open_engine: Callable[..., DiffusersEngine]) -> None:
    """A pipeline that is stopped restores no attention processors, so the engine does."""
    pipeline = pag()
    engine = open_engine(pipeline)
    before = dict(pipeline.unet.attn_processors)
    run = Run(engine)
    report = run.report

    def cancel(event: Any) -> None:
        report(event)
        if getattr(event, "step", 0) == 1:
            run.stop.set()

    with pytest.raises(Exception, match="cancelled"):
        engine.run(JOB, cancel, run.stop)
    now = pipeline.unet.attn_processors
    assert all(now[name] is processor for name, processor in before.items())
