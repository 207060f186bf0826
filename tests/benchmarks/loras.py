"""Measures what LoRAs cost: rows with them next to rows without, and requests without them where some are loaded."""

from __future__ import annotations

import math
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.runs import bundled
from calotype_server.engine import capabilities
from calotype_server.engine.adapters.load import load_loras
from calotype_server.engine.requests.sample_calls import sample_calls
from calotype_server.engine.runtime.check import joinable
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.runtime.lora import LoraRuntime
from calotype_server.types import Lora
from support.engine import tiny
from support.engine.files.loras import save_lora

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.engine.runtime.collate import Call

RANKS = {"bundled": 16}
"""The tiny models have layers of 32 to 64 channels."""

TINY_RANK = 4
REQUESTS = 4
TINY = ("sd15", "flux")


def measure(rounds: int) -> dict[str, float]:
    """Returns the CPU time of a denoiser call of four requests with LoRAs, over the same call without.

    `same`: all have one LoRA; `mixed`: two have one, one has another, and one has none; `loaded`: none has one,
    compared with a model for which none are loaded.

    Args:
        rounds: The calls are repeated 2 times as often (bundled model) or 16 times (tiny models). The least CPU time
            counts, because other processes only add to it.
    """
    pipeline, model = bundled()
    results = _measure("bundled", pipeline, model, 2 * rounds)
    for family in TINY:
        pipeline = tiny.prompted(family)
        model = replace(capabilities.describe(family, pipeline, capabilities.Defaults()), width=64, height=64)
        torch.set_num_threads(1)
        results |= _measure(f"tiny_{family}", pipeline, model, 16 * rounds)
    return results


@torch.no_grad()
def _measure(name: str, pipeline: Any, model: Any, count: int) -> dict[str, float]:
    module = getattr(pipeline, capabilities.denoiser_name(pipeline))
    plain = EagerRuntime(module)
    calls = joinable(plain, sample_calls(pipeline, model))
    calls = [calls[number % len(calls)] for number in range(REQUESTS)]
    with tempfile.TemporaryDirectory() as folder:
        files = {
            each: str(
                save_lora(
                    Path(folder) / f"{each}.safetensors",
                    pipeline,
                    seed=number,
                    rank=RANKS.get(name, TINY_RANK),
                    size=0.01,
                )
            )
            for number, each in enumerate(("first", "second"))
        }
        loras = load_loras(pipeline, files)
    assert loras is not None
    runtime = LoraRuntime(plain, loras, exact=False)
    first, second = (Lora("first", 0.8),), (Lora("second"),)
    work = {
        "without": _call(plain, calls),
        "loaded": _call(runtime, calls),
        "same": _call(runtime, [replace(call, loras=first) for call in calls]),
        "mixed": _call(
            runtime,
            [replace(call, loras=each) for call, each in zip(calls, (first, first, second, ()), strict=True)],
        ),
    }
    seconds = least_seconds(work, count)
    return {
        f"lora_{kind}_over_without_{name}": seconds[kind] / seconds["without"] for kind in ("same", "mixed", "loaded")
    }


def _call(runtime: DenoiserRuntime, calls: Sequence[Call]) -> Callable[[], object]:
    rows = sum(call.rows for call in calls)
    return lambda: runtime.run(calls, rows)


def least_seconds(work: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Returns the least CPU time of each function in this process, over `count` calls in random order."""
    order, least = random.Random(0), dict.fromkeys(work, math.inf)
    for _ in range(count):
        for name in order.sample(list(work), len(work)):
            work[name]()  # Otherwise the weights of the function before would be in the processor's cache.
            started = time.process_time()
            work[name]()
            least[name] = min(least[name], time.process_time() - started)
    return least
