"""Compares the runtimes of the denoiser that a CPU has, `openvino` and `compile`, with plain calls.

Each runtime is prepared as when the server loads the model, and computes with the threads of its own plan. The calls
take turns, and the fastest of each counts. Wall times need idle cores. CPU times are those of all threads.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.runs import DEFAULT_THREADS, GUIDANCE, STEPS, loaded
from calotype_server.engine import capabilities
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.batching.denoiser import prepare_denoiser
from calotype_server.engine.batching.plan import PlanOptions
from calotype_server.engine.protocol import Stop
from calotype_server.engine.requests.sample_calls import default_arguments
from calotype_server.engine.runtime.select import check_available
from calotype_server.errors import AcceleratorUnavailable
from calotype_server.types import Job

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.engine.batching.denoiser import PreparedDenoiser
    from calotype_server.engine.diffusers_engine import DiffusersEngine
    from calotype_server.types import ModelInfo

RUNTIMES = ("openvino", "compile")
ROWS = (1, 2, 4, 8, 16)
"""Of latents. A request with guidance has two."""


def measure(rounds: int) -> dict[str, float]:
    """Returns wall and CPU time of joined calls and of whole requests, relative to plain calls, and the time to load.

    A runtime that this machine cannot use has no figures; a printed line says why.

    Args:
        rounds: Number of measurements.
    """
    results: dict[str, float] = {}
    for name in RUNTIMES:
        try:
            check_available(name, torch.device("cpu"))
        except AcceleratorUnavailable as error:
            print(f"{name} is not measured: {error}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = _calls(name, rounds, Path(folder)) | _requests(name, rounds, Path(folder))
        results |= {f"{name}_{figure}": value for figure, value in found.items()}
    return results


@torch.no_grad()
def _calls(name: str, rounds: int, cache_dir: Path) -> dict[str, float]:
    """Returns the figures of joined calls, and the seconds in which both denoisers were prepared without caches."""
    pipeline, model = loaded()
    torch.set_num_threads(DEFAULT_THREADS)
    results, prepared = {}, []
    for figure, accelerate in (("eager_load_seconds", "none"), ("load_seconds", name)):
        started = time.perf_counter()
        denoiser = prepare_denoiser(
            pipeline,
            model,
            PlanOptions(max_active=None),
            accelerate=accelerate,
            cache_dir=cache_dir,
            measure_again=False,
            on_fallback=lambda: None,
        )
        results[figure] = time.perf_counter() - started
        _check(accelerate, denoiser.runtime.name, denoiser.fallback)
        prepared.append(denoiser)
    for rows in ROWS:
        eager, ours = (_joined(each, pipeline, model, rows) for each in prepared)
        results |= {f"rows{rows}_{figure}": value for figure, value in _compare(eager, ours, rounds).items()}
    return results


def _joined(denoiser: PreparedDenoiser, pipeline: Any, model: ModelInfo, rows: int) -> Callable[[], object]:
    """Returns a function that computes so many rows, as joined default requests if possible."""
    one = model if rows > 1 else replace(model, guidance_scale=1.0)
    call = denoiser.runtime.collator.bind(*default_arguments(pipeline, one), {})
    calls = [call] * (rows // call.rows)

    def compute() -> object:
        torch.set_num_threads(denoiser.plan.threads.of(rows))
        return denoiser.runtime.run(calls, rows)

    return compute


def _requests(name: str, rounds: int, cache_dir: Path) -> dict[str, float]:
    """Returns the figures of whole requests."""
    engines: list[DiffusersEngine] = []
    try:
        for accelerate in ("none", name):
            pipeline, model = loaded()
            torch.set_num_threads(DEFAULT_THREADS)
            engine = build_engine(
                model.name,
                pipeline,
                defaults=capabilities.Defaults(STEPS, GUIDANCE),
                cache_dir=cache_dir,
                max_active=None,
                accelerate=accelerate,
            )
            engines.append(engine)
            _check(accelerate, engine.model.accelerator, engine.model.accelerator_fallback)
        eager, ours = (_generating(each) for each in engines)
        return {f"request_{figure}": value for figure, value in _compare(eager, ours, rounds).items()}
    finally:
        for engine in engines:
            engine.close()


def _generating(engine: DiffusersEngine) -> Callable[[], object]:
    model = engine.model
    job = Job("a red apple", None, model.width, model.height, STEPS, GUIDANCE, 1, model.scheduler)
    return lambda: engine.run(job, lambda _: None, Stop())


def _check(accelerate: str, active: str, fallback: str) -> None:
    if active != accelerate:
        raise RuntimeError(f"{accelerate} is not active: {fallback}")


def _compare(eager: Callable[[], object], ours: Callable[[], object], rounds: int) -> dict[str, float]:
    """Returns wall and CPU time of `ours` relative to `eager`."""
    functions = (eager, ours)
    wall, cpu = [math.inf] * 2, [math.inf] * 2
    for number in range(rounds + 1):
        for index, function in enumerate(functions):
            before = time.perf_counter(), time.process_time()
            function()
            if number:
                wall[index] = min(wall[index], time.perf_counter() - before[0])
                cpu[index] = min(cpu[index], time.process_time() - before[1])
    return {"over_eager": wall[1] / wall[0], "cpu_over_eager": cpu[1] / cpu[0]}
