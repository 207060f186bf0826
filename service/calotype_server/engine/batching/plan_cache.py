"""Keeps batching plans on disk, so that only the first start with a model, on a machine, measures it.

One JSON file for each key: the weights, the machine, the libraries and the settings that a plan depends on. A file
repeats the facts that make up its key, for people and against files that were copied to another name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import diffusers
import structlog
import torch

from calotype_server import __version__
from calotype_server.engine.batching.measure import Threads
from calotype_server.engine.batching.plan import (
    Plan,
    PlanOptions,
    measure_plan,
    measures_threads,
    reason_to_run_alone,
)
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.disk_cache import config_of, facts_path, load_checked, save_checked, weights_fingerprint
from calotype_server.engine.machine import machine_facts

if TYPE_CHECKING:
    from pathlib import Path

    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.types import ModelInfo

__all__ = ["find_plan", "load_plan", "plan_facts", "plan_path", "save_plan"]

_log = structlog.get_logger(__name__)

_FORMAT = 3
"""Part of the key: increase it when the measurements or the file change their meaning."""


def find_plan(
    pipeline: Any,
    model: ModelInfo,
    options: PlanOptions,
    runtime: DenoiserRuntime,
    *,
    cache_dir: Path,
    measure_again: bool = False,
) -> Plan:
    """Returns the plan for a pipeline from the cache, or else measures it and stores it.

    Args:
        pipeline: The loaded pipeline; not changed.
        model: Its description.
        options: The operator's settings.
        runtime: Computes the denoiser.
        cache_dir: Folder of all caches; plans are in `plans` below it.
        measure_again: Ignore a cached plan, and replace it.
    """
    if reason_to_run_alone(pipeline, options) is not None and not measures_threads(model, options):
        return measure_plan(pipeline, model, options, runtime)  # There is nothing to measure.
    name = runtime.name
    try:
        facts = plan_facts(pipeline, model, options, name)
    except Exception as error:  # weights of an unusual kind
        _log.warning("cannot cache the batching plan of this model", error=repr(error))
        return measure_plan(pipeline, model, options, runtime)
    path = plan_path(cache_dir, facts)
    plan = None if measure_again else load_plan(path, facts)
    if plan is not None:
        _log.info("batching plan loaded", path=str(path))
        return plan
    started = time.monotonic()
    plan = measure_plan(pipeline, model, options, runtime)
    _log.info("batching plan measured", seconds=round(time.monotonic() - started, 2))
    if not plan.provisional and runtime.name == name:  # An accelerator may fail meanwhile.
        save_plan(path, facts, plan)
    return plan


def plan_facts(pipeline: Any, model: ModelInfo, options: PlanOptions, runtime: str = "none") -> dict[str, Any]:
    """Returns everything that a plan depends on, as plain values for JSON.

    Args:
        pipeline: The loaded pipeline.
        model: Its description.
        options: The operator's settings.
        runtime: Name of the runtime that computes the denoiser.
    """
    module = getattr(pipeline, denoiser_name(pipeline))
    facts = {
        "format": _FORMAT,
        "versions": {"calotype": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "machine": machine_facts(torch.device(model.device)),
        "pipeline": type(pipeline).__name__,
        "denoiser": type(module).__name__,
        "components": {name: type(component).__name__ for name, component in pipeline.components.items()},
        "config": config_of(module),
        "weights": weights_fingerprint(module),
        "request": [model.width, model.height, model.step_count, model.guidance_scale, model.scheduler],
        "device": model.device,
        "dtype": model.dtype,
        "runtime": [runtime, version("openvino") if runtime == "openvino" else ""],
        "options": dataclasses.asdict(options),
        "runs_alone": reason_to_run_alone(pipeline, options),
    }
    return json.loads(json.dumps(facts, default=str))


def plan_path(cache_dir: Path, facts: dict[str, Any]) -> Path:
    """Returns the file for a plan that depends on these facts."""
    return facts_path(cache_dir, "plans", facts)


def load_plan(path: Path, facts: dict[str, Any]) -> Plan | None:
    """Returns the plan, or None if there is none. A file that cannot be used is logged, and replaced later."""
    return load_checked(path, facts, _decode, key="plan", kind="batching plan")


def save_plan(path: Path, facts: dict[str, Any], plan: Plan) -> None:
    """Writes the plan. If the folder is not writable, that is logged, and the next start measures again."""
    save_checked(path, facts, _encode(plan), key="plan", kind="batching plan")


def _encode(plan: Plan) -> dict[str, Any]:
    """Encodes infinity as null, because JSON has no infinity."""
    threads = plan.threads
    from_rows = None if math.isinf(threads.from_rows) else threads.from_rows
    return {
        "max_active": plan.max_active,
        "max_rows": plan.max_rows,
        "request_rows": plan.request_rows,
        "reason": plan.reason,
        "threads": {"few": threads.few, "many": threads.many, "from_rows": from_rows},
    }


def _decode(stored: Any) -> Plan:
    """Raises an exception of any kind if this is not a plan."""
    threads = stored["threads"]
    from_rows = math.inf if threads["from_rows"] is None else _count(threads["from_rows"], 1)
    if not isinstance(stored["reason"], str):
        raise TypeError("reason is not a string")
    return Plan(
        _count(stored["max_active"], 1),
        _count(stored["max_rows"], 0),
        stored["reason"],
        Threads(_count(threads["few"], 1), _count(threads["many"], 1), from_rows),
        request_rows=_count(stored["request_rows"], 1),
    )


def _count(value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is not a whole number from {least}")
    return value
