"""Builds an engine around a loaded pipeline."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.batching.batcher import StepBatcher
from calotype_server.engine.batching.denoiser import PreparedDenoiser, prepare_denoiser
from calotype_server.engine.batching.plan import PlanOptions
from calotype_server.engine.batching.verify import unbatchable
from calotype_server.engine.capabilities import Defaults, denoiser_name, describe
from calotype_server.engine.diffusers_engine import DiffusersEngine
from calotype_server.engine.early_finish import EarlyFinisher
from calotype_server.engine.generation_run import EngineParts
from calotype_server.engine.memory import is_device_failure
from calotype_server.engine.memory_need import memory_model
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.engine.preview.costs import CoreCosts, DeviceCosts
from calotype_server.engine.preview.pipeline_previews import PipelinePreviews
from calotype_server.engine.prompts.support import prompt_syntaxes
from calotype_server.engine.requests.sample_calls import default_arguments
from calotype_server.engine.requests.shared_components import shared_components
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.requests.zero_answers import zero_proxy
from calotype_server.engine.runtime.device_thread import DeviceThread
from calotype_server.engine.step_cache.offered import fast_schedulers
from calotype_server.observability.events import AcceleratorActive, BatchDone, Observe, ignore
from calotype_server.types import OtherSizes, PreviewMethod, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from calotype_server.engine.adapters.loras import Loras
    from calotype_server.engine.batching.batch_runner import BatchRecord
    from calotype_server.engine.batching.plan import Plan
    from calotype_server.types import ModelInfo

__all__ = ["build_engine"]

_log = structlog.get_logger(__name__)


def build_engine(
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
    host_timesteps: bool = False,
    schedule: Schedule = Schedule.FIRST_LOOK,
    step_cache: bool = False,
    accelerate: str = "auto",
    measure_again: bool = False,
    memory_limit: int | None = 0,
    reserved_bytes: int = 0,
    other_sizes: OtherSizes = OtherSizes.REJECT,
    loras: Loras | None = None,
    on_batch: Callable[[BatchRecord], None] | None = None,
    observe: Observe = ignore,
) -> DiffusersEngine:
    """Plans the batching, fits the preview head, and starts the engine's threads.

    Args:
        name: The model's name, for people.
        pipeline: A loaded text-to-image pipeline; it is never changed.
        defaults: Defaults that override the pipeline's own.
        cache_dir: Folder for batching plans and preview heads.
        threads: CPU threads for torch. None: the fastest number, measured, or torch's default if `deterministic`.
        budget: Chooses how previews are rendered. None: a budget of 2 % of the denoiser's time.
        preview_methods: Methods that the operator allows.
        tiny_vae: An `AutoencoderTiny` that fits the pipeline, or None.
        max_active: Generations that run at once. None: as many as memory allows, up to 8.
        max_rows: Most rows of latents that the denoiser computes together. None: as many as pay off, measured.
        deterministic: Whether an image must be bitwise the same regardless of other generations.
        host_timesteps: Whether schedulers get their timesteps in ordinary memory, so that they do not wait for a GPU.
        schedule: Which generations come first if not all fit into one call of the denoiser.
        step_cache: Whether requests may choose `Speed.FAST`.
        accelerate: How to compute the denoiser; see `prepare_denoiser`.
        measure_again: Whether to ignore a cached batching plan and replace it.
        memory_limit: Bytes that running generations may use together; 0 for no limit, None for the free memory.
        reserved_bytes: Bytes of the free memory that are for other purposes.
        other_sizes: What happens with requests for sizes that the model does not draw well.
        loras: LoRAs of the pipeline that requests may choose, or None.
        on_batch: Called after every call of a shared denoiser; it must not block.
        observe: Receives observations.
    """
    model = replace(
        describe(name, pipeline, defaults, other_sizes),
        prompt_syntaxes=prompt_syntaxes(pipeline),
        loras=() if loras is None else loras.names,
    )
    _log.info("model loaded", model=name, device=model.device)
    options = PlanOptions(max_active, max_rows, threads, deterministic)
    device = DeviceThread()
    try:
        denoiser = device.call(
            lambda: prepare_denoiser(
                pipeline,
                model,
                options,
                accelerate=accelerate,
                cache_dir=cache_dir,
                measure_again=measure_again,
                on_fallback=lambda: observe(AcceleratorActive("none")),
                loras=loras,
            )
        )
    except BaseException:
        device.close()
        raise
    observe(AcceleratorActive(denoiser.runtime.name))
    plan = denoiser.plan
    step_threads = plan.threads.of(plan.max_rows)
    _log.info(
        "concurrency",
        max_active=plan.max_active,
        max_rows=plan.max_rows,
        threads=step_threads,
        unbatched=plan.reason or None,
    )
    torch.set_num_threads(plan.threads.few)
    budget = budget or PreviewBudget(share=0.02)
    on_cpu = model.device == "cpu"
    budget.charge(CoreCosts(min(1.0, step_threads / (os.cpu_count() or 1))) if on_cpu else DeviceCosts())
    batcher = _start_batcher(device, denoiser, deterministic, schedule, _batch_observer(observe, on_batch))
    shared = _shared_pipeline(pipeline, batcher)
    if step_cache:
        model = replace(model, fast_schedulers=_fast_schedulers(pipeline, model, plan))
    quiet = shared if batcher is not None else _without_denoiser(shared, model)
    previews = PipelinePreviews(
        quiet,
        model,
        cache_dir=cache_dir,
        allowed=preview_methods,
        budget=budget,
        tiny_vae=tiny_vae,
        observe=observe,
        learns=not deterministic,
    )
    return DiffusersEngine(
        EngineParts(
            pipeline=shared,
            denoiser=denoiser_name(pipeline),
            model=replace(
                _planned(model, denoiser, schedule, previews),
                memory=memory_model(pipeline, model, cache_dir=cache_dir, limit=memory_limit, reserved=reserved_bytes),
            ),
            previews=previews,
            finisher=EarlyFinisher(_with_session(quiet, batcher)),
            budget=budget,
            batcher=batcher,
            runtime=denoiser.runtime,
            # Encoding a prompt and decoding an image are enough work for all threads.
            threads=plan.threads.few if batcher is None else plan.threads.many,
            host_timesteps=host_timesteps,
            loras=loras,
        )
    )


def _batch_observer(observe: Observe, on_batch: Callable[[BatchRecord], None] | None) -> Callable[[BatchRecord], None]:
    def batch_done(record: BatchRecord) -> None:
        observe(BatchDone(record.rows, record.seconds))
        if on_batch is not None:
            on_batch(record)

    return batch_done


def _start_batcher(
    device: DeviceThread,
    denoiser: PreparedDenoiser,
    deterministic: bool,
    schedule: Schedule,
    on_batch: Callable[[BatchRecord], None],
) -> StepBatcher | None:
    """Returns the batcher, or None if pipelines must call the denoiser themselves."""
    plan = denoiser.plan
    if plan.max_rows == 0:
        device.close()
        return None
    with_loras = denoiser.lora_runtime
    return StepBatcher(
        with_loras or denoiser.runtime,
        thread=device,
        max_rows=plan.max_rows,
        threads=plan.threads,
        deterministic=deterministic and not plan.reason,
        schedule=schedule,
        on_batch=on_batch,
        mixes_loras=with_loras is None or with_loras.mixes,
    )


def _shared_pipeline(pipeline: Any, batcher: StepBatcher | None) -> Any:
    """Returns a view of the pipeline that is safe to use while requests run."""
    view = request_view(pipeline, pipeline.scheduler, **shared_components(pipeline))
    # Previews call the denoiser as well, to learn shapes.
    return _with_session(view, batcher)


def _with_session(pipeline: Any, batcher: StepBatcher | None) -> Any:
    """Returns a view of the pipeline with its own session of the shared denoiser, for previews and early finishes."""
    # Joined with theirs, the last bits of a request's answers would depend on its previews.
    own = {} if batcher is None else {denoiser_name(pipeline): batcher.open_session(alone=True).proxy()}
    return request_view(pipeline, pipeline.scheduler, **own)


@torch.no_grad()
def _without_denoiser(pipeline: Any, model: ModelInfo) -> Any:
    """Returns a view of the pipeline that never calls the denoiser, which a request may use, and change, meanwhile."""
    name = denoiser_name(pipeline)
    module = getattr(pipeline, name)
    try:
        args, kwargs = default_arguments(pipeline, model)
        answer = module(*args, **kwargs)
    except Exception as error:
        if is_device_failure(error):
            raise
        _log.debug("previews call the denoiser", exc_info=error)
        return pipeline
    example = args[0] if args else next(iter(kwargs.values()))
    return request_view(pipeline, pipeline.scheduler, **{name: zero_proxy(module, example, answer)})


def _fast_schedulers(pipeline: Any, model: ModelInfo, plan: Plan) -> tuple[str, ...]:
    """Returns the schedulers that requests may combine with `Speed.FAST`."""
    if plan.max_rows == 0 and not plan.provisional:
        # Such a model keeps state between calls, or code outside the pipeline's call relies on each call.
        reason = unbatchable(getattr(pipeline, denoiser_name(pipeline))) or plan.reason
        _log.warning("the step cache is not offered", reason=reason)
        return ()
    return fast_schedulers(pipeline, model.scheduler_details)


def _planned(model: ModelInfo, denoiser: PreparedDenoiser, schedule: Schedule, previews: PipelinePreviews) -> ModelInfo:
    plan = denoiser.plan
    return replace(
        model,
        preview_methods=previews.methods,
        max_active=plan.max_active,
        max_progressing=0 if schedule is Schedule.FAIR else plan.max_joined,
        max_batch_rows=0 if plan.reason else plan.max_rows,
        unbatched_reason=plan.reason,
        accelerator=denoiser.runtime.name,
        accelerator_fallback=denoiser.fallback,
    )
