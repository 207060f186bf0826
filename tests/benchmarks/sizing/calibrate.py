"""What the bundled model takes on this machine: the numbers that the simulation starts from."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from benchmarks.runs import GUIDANCE, STEPS, bundled_engine
from benchmarks.sizing.fleet import Model
from calotype_server.engine.protocol import Stop
from calotype_server.types import Decoding, Denoising, EncodingPrompt, Event, Job

if TYPE_CHECKING:
    from calotype_server.engine.batching.batcher import BatchRecord

_JOB = Job("a red apple", None, 128, 128, STEPS, GUIDANCE, 0, "DDIMScheduler")
_GENERATIONS = 6
"""Of each of those who draw at once, one after the other."""
_LEAST_SAMPLES = 10


def calibrate() -> tuple[Model, int, int]:
    """Keeps 1, 2, 4 and so on generations at work, and takes the medians of what each part took.

    Returns:
        The model, and how many generations and rows the engine found to pay at once.
    """
    batches: list[BatchRecord] = []
    engine = bundled_engine(max_active=None, on_batch=batches.append)
    most, rows = engine.model.max_active, engine.model.max_batch_rows
    phases: dict[str, list[float]] = defaultdict(list)

    def generate(number: int) -> None:
        marks: dict[type, float] = {}

        def report(event: Event) -> None:
            marks.setdefault(type(event), time.monotonic())

        for _ in range(_GENERATIONS):
            marks.clear()
            engine.run(replace(_JOB, seed=number), report, Stop())
            phases["encoding"].append(marks[Denoising] - marks[EncodingPrompt])
            phases["decoding"].append(time.monotonic() - marks[Decoding])

    generate(0)
    batches.clear()
    phases.clear()
    calls: dict[int, list[float]] = defaultdict(list)
    gaps: list[float] = []
    together = [2**power for power in range(10) if 2**power < most] + [most]
    for count in together:
        threads = [threading.Thread(target=generate, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for before, after in zip(batches, batches[1:], strict=False):
            calls[after.rows].append(after.seconds)
            if set(before.streams) == set(after.streams):  # otherwise somebody may have been waited for
                gaps.append((after.started - before.started - before.seconds) / len(after.streams))
        batches.clear()
    engine.close()
    medians = {rows: statistics.median(each) for rows, each in sorted(calls.items()) if len(each) >= _LEAST_SAMPLES}
    model = Model(
        # More rows never take less: where it looks so, something else was at work.
        tuple((count, max(seconds for fewer, seconds in medians.items() if fewer <= count)) for count in medians),
        steps=STEPS,
        rows=min(medians),
        between=statistics.median(gaps),
        encoding=statistics.median(phases["encoding"]),
        decoding=statistics.median(phases["decoding"]),
        shared=torch.cuda.is_available(),
    )
    return model, most, rows
