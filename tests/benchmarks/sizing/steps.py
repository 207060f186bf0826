"""Measures the bundled model on one core, in processor time, which does not depend on other work of the machine."""

from __future__ import annotations

import functools
import statistics
import time
from typing import TYPE_CHECKING

import torch

from benchmarks.runs import GUIDANCE, STEPS, bundled
from benchmarks.sizing.fleet import Model
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.requests.sample_calls import sample_calls
from calotype_server.engine.runtime.collate import Collator

if TYPE_CHECKING:
    from collections.abc import Callable

_TOGETHER = (1, 2, 4, 8)
_REPEATS = 9


@torch.no_grad()
def measure() -> Model:
    """Times a call joined with itself, like `measure.knee` when a model loads, and the work around the steps."""
    pipeline, model = bundled()
    torch.set_num_threads(1)
    module = getattr(pipeline, denoiser_name(pipeline))
    collator = Collator(module)
    args, kwargs = sample_calls(pipeline, model)[0]
    call = collator.bind(args, kwargs, {})
    table = []
    for count in _TOGETHER:
        joined_args, joined_kwargs = collator.join([call] * count, call.rows * count)
        table.append((call.rows * count, _seconds(functools.partial(module, *joined_args, **joined_kwargs))))
    latents = (*joined_args, joined_kwargs.get("sample"))[0][:1]
    whole = _seconds(lambda: pipeline("a red apple", num_inference_steps=1, guidance_scale=GUIDANCE))
    decoding = _seconds(lambda: pipeline.vae.decode(latents))
    return Model(
        tuple(table),
        steps=STEPS,
        rows=call.rows,
        encoding=max(0.0, whole - decoding - table[0][1]),
        decoding=decoding,
        shared=False,
    )


def _seconds(function: Callable[[], object]) -> float:
    """Returns the median processor seconds of this thread, the only one that computes, after a warm-up call."""
    function()
    taken = []
    for _ in range(_REPEATS):
        started = time.thread_time()
        function()
        taken.append(time.thread_time() - started)
    return statistics.median(taken)
