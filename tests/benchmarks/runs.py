"""The bundled model in this process, for benchmarks and figures that need its internals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine import capabilities, loading
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.batching.measure import pick_threads
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.engine.tap import Step, StepTap

if TYPE_CHECKING:
    from calotype_server.engine.diffusers_engine import DiffusersEngine
    from calotype_server.types import ModelInfo

STEPS = 20
GUIDANCE = 3.0
DEFAULT_THREADS = torch.get_num_threads()
"""Torch's own number, before a benchmark sets another one."""


def loaded() -> tuple[Any, ModelInfo]:
    """Returns the pipeline and its description."""
    pipeline = loading.load_pipeline(loading.LoadOptions(model="bundled"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, capabilities.describe("bundled", pipeline, capabilities.Defaults(STEPS, GUIDANCE))


def bundled() -> tuple[Any, ModelInfo]:
    """As `loaded`; also sets torch to the number of threads that the server would choose."""
    pipeline, model = loaded()
    torch.set_num_threads(pick_threads(pipeline, model, EagerRuntime(pipeline.unet)))
    return pipeline, model


def tiny_vae(pipeline: Any) -> Any:
    """Returns the bundled model's tiny VAE, or None if there is none."""
    name = capabilities.read_defaults(loading.locate("bundled")).tiny_vae
    return None if name is None else loading.load_tiny_vae(name, like=pipeline.vae)


def watched(pipeline: Any, prompt: str, seed: int) -> tuple[dict[int, Step], torch.Tensor]:
    """Generates an image; returns every step by its number, and the image: (1, 3, height, width), 0 to 1."""
    scheduler = make_scheduler(pipeline, type(pipeline.scheduler).__name__)
    steps: dict[int, Step] = {}

    def keep(step: Step) -> None:
        steps[step.number] = step

    StepTap(scheduler, on_start=lambda _: None, on_step=keep, should_stop=lambda: False)
    picture = request_view(pipeline, scheduler)(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )[0]
    return steps, picture.float()


def bundled_engine(**options: Any) -> DiffusersEngine:
    """Returns the product's engine with the bundled model and the number of threads that it would choose."""
    pipeline, model = bundled()
    return build_engine(
        model.name,
        pipeline,
        defaults=capabilities.Defaults(STEPS, GUIDANCE),
        cache_dir=Path("~/.cache/calotype"),
        threads=torch.get_num_threads(),
        **options,
    )
