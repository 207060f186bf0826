"""Prepares the shared denoiser when the model loads: its runtime, its batching plan and its thread."""

from __future__ import annotations

import dataclasses
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.batching.mixed_loras import lora_runtime
from calotype_server.engine.batching.plan import Plan, PlanOptions, deterministic_rows, most_rows
from calotype_server.engine.batching.plan_cache import find_plan
from calotype_server.engine.batching.verify import unbatchable
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.machine import select_device
from calotype_server.engine.memory import is_device_failure
from calotype_server.engine.requests.sample_calls import sample_calls
from calotype_server.engine.runtime.check import joinable
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.runtime.select import Selection, select_runtime

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from calotype_server.engine.adapters.loras import Loras
    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.engine.runtime.lora import LoraRuntime
    from calotype_server.types import ModelInfo

__all__ = ["PreparedDenoiser", "prepare_denoiser"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedDenoiser:
    """How generations share the denoiser.

    Attributes:
        runtime: Computes the denoiser.
        plan: The batching plan.
        fallback: Why the runtime is not the requested one, in one sentence; empty if it is.
        lora_runtime: Also computes calls with LoRAs; None if there are no LoRAs.
    """

    runtime: DenoiserRuntime
    plan: Plan
    fallback: str
    lora_runtime: LoraRuntime | None = None


@torch.no_grad()
def prepare_denoiser(
    pipeline: Any,
    model: ModelInfo,
    options: PlanOptions,
    *,
    accelerate: str,
    cache_dir: Path,
    measure_again: bool,
    on_fallback: Callable[[], None],
    loras: Loras | None = None,
) -> PreparedDenoiser:
    """Selects the runtime, plans the batching with it, and makes the calls that prepare it. Call in the device thread.

    Args:
        pipeline: The loaded pipeline; not changed.
        model: Its description.
        options: The operator's settings.
        accelerate: Value of `--accelerate`. "auto" means plain calls: images are then bitwise those of the pipeline,
            and no accelerator was tried on a GPU yet.
        cache_dir: Folder of all caches.
        measure_again: Whether to ignore a cached batching plan and replace it.
        on_fallback: Called by the device thread when the accelerator fails later. It must not block.
        loras: LoRAs of the model, or None.
    """
    select_device(torch.device(model.device))
    eager = Selection(EagerRuntime(getattr(pipeline, denoiser_name(pipeline)), exact=options.deterministic))
    requested = accelerate not in ("auto", "none")
    selected = eager
    if requested:
        selected = _accelerated(pipeline, model, options, eager, accelerate, cache_dir, on_fallback)
    plan = find_plan(pipeline, model, options, selected.runtime, cache_dir=cache_dir, measure_again=measure_again)
    if plan.max_rows == 0 and selected.runtime is not eager.runtime:
        selected.runtime.clear()
        selected = dataclasses.replace(eager, fallback=plan.reason)
    if selected.runtime is not eager.runtime:
        # Only what the plan needs: measuring also tried other numbers of rows and threads.
        selected.runtime.clear()
        selected = _warmed_up(selected, eager, pipeline, model, plan, options)
    _log.info("denoiser runtime", accelerator=selected.runtime.name, requested=accelerate, fallback=selected.fallback)
    if loras is None:
        return PreparedDenoiser(selected.runtime, plan, selected.fallback)
    with_loras = lora_runtime(selected.runtime, loras, pipeline, model, plan, options)
    return PreparedDenoiser(selected.runtime, plan, selected.fallback, with_loras)


def _accelerated(
    pipeline: Any,
    model: ModelInfo,
    options: PlanOptions,
    eager: Selection,
    accelerate: str,
    cache_dir: Path,
    on_fallback: Callable[[], None],
) -> Selection:
    reason = unbatchable(getattr(pipeline, denoiser_name(pipeline)))
    if reason is not None:
        return dataclasses.replace(eager, fallback=reason)
    try:
        calls = sample_calls(pipeline, model)
        rows = eager.runtime.collator.bind(*calls[0], {}).rows
    except Exception as error:
        if is_device_failure(error):
            raise
        _log.exception("the denoiser cannot be measured")
        return dataclasses.replace(eager, fallback="The denoiser could not be measured.")
    return select_runtime(
        accelerate,
        eager.runtime.module,
        calls,
        exact_rows=deterministic_rows(options, rows),
        max_rows=most_rows(options, rows),
        cache_dir=cache_dir,
        on_fallback=on_fallback,
    )


def _warmed_up(
    selected: Selection, eager: Selection, pipeline: Any, model: ModelInfo, plan: Plan, options: PlanOptions
) -> Selection:
    """Returns the selection after `_warm_up`, or plain calls if it fails: then the server starts all the same."""
    try:
        _warm_up(selected.runtime, pipeline, model, plan, options)
    except Exception as error:
        if is_device_failure(error):
            raise
        name = selected.runtime.name
        _log.warning("the accelerator cannot be prepared", accelerator=name, exc_info=error)
        traceback.clear_frames(error.__traceback__)
        selected.runtime.clear()
        return dataclasses.replace(eager, fallback=f"The accelerator {name} could not be prepared.")
    return selected


def _warm_up(runtime: DenoiserRuntime, pipeline: Any, model: ModelInfo, plan: Plan, options: PlanOptions) -> None:
    """Computes a default request's calls with every number of rows that batches of such requests have."""
    calls = joinable(runtime, sample_calls(pipeline, model))
    rows = calls[0].rows
    most = 1 if plan.reason else max(1, plan.max_rows // rows)
    counts = [most] if options.deterministic and not plan.reason else range(most, 0, -1)
    before = torch.get_num_threads()
    try:
        for count in counts:
            padded_rows = max(rows * count, plan.max_rows if options.deterministic and not plan.reason else 0)
            torch.set_num_threads(plan.threads.of(padded_rows))
            runtime.run([calls[number % len(calls)] for number in range(count)], padded_rows)
    finally:
        torch.set_num_threads(before)
    runtime.end_loading()
