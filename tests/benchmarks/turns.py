"""Users of a model that computes one request at a time, with each schedule.

The batcher, its threads and its clock are real. The denoiser only spends a fixed time, so that the figures show the
schedule and not the model: asleep like a thread that waits for a GPU, or at work like one that launches its kernels.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from calotype_server.engine.batching.batcher import StepBatcher
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.types import Schedule

if TYPE_CHECKING:
    from calotype_server.engine.batching.batch_runner import BatchRecord

__all__ = ["TurnsRun", "measure", "run_turns"]

USERS = 8
STEP_SECONDS = 0.02


@dataclass(frozen=True)
class TurnsRun:
    """Users who arrive together.

    Attributes:
        looks: Seconds from the start to the end of the first step, of each user.
        ends: Seconds to the end of the last step.
        records: The calls of the denoiser, in order.
    """

    looks: list[float]
    ends: list[float]
    records: list[BatchRecord]


class _Denoiser(torch.nn.Module):
    """Answers with its input after a fixed time."""

    def __init__(self, seconds: float, *, spin: bool) -> None:
        super().__init__()
        self._seconds = seconds
        self._spin = spin

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        if self._spin:
            until = time.perf_counter() + self._seconds
            while time.perf_counter() < until:
                pass
        else:
            time.sleep(self._seconds)
        return (sample,)


def run_turns(schedule: Schedule, steps: int, *, seconds: float = STEP_SECONDS, spin: bool = False) -> TurnsRun:
    """Runs eight users to their end; each takes so many steps of so many seconds."""
    records: list[BatchRecord] = []
    batcher = StepBatcher(
        EagerRuntime(_Denoiser(seconds, spin=spin)), max_rows=1, schedule=schedule, on_batch=records.append
    )
    looks, ends = [0.0] * USERS, [0.0] * USERS
    together = threading.Barrier(USERS + 1)
    started = 0.0

    def user(number: int) -> None:
        together.wait()
        with batcher.open_session() as session:
            denoiser = session.proxy()
            for step in range(1, steps + 1):
                denoiser(torch.zeros(1, 4), torch.tensor(step))
                if step == 1:
                    session.note_look()
                    looks[number] = time.perf_counter() - started
                if step == steps:
                    session.expect_no_more()
            ends[number] = time.perf_counter() - started

    threads = [threading.Thread(target=user, args=(number,)) for number in range(USERS)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    together.wait()
    for thread in threads:
        thread.join()
    batcher.close()
    return TurnsRun(looks, ends, records)


def measure(rounds: int) -> dict[str, float]:
    """Returns mean first preview, mean end and throughput of the default schedule, relative to FIFO.

    Args:
        rounds: Number of measurements, in turn; the median counts.
    """
    results = {}
    for kind, spin in (("sleeping", False), ("spinning", True)):
        for steps in (20, 4):
            pairs = [
                [run_turns(schedule, steps, spin=spin) for schedule in (Schedule.FIRST_LOOK, Schedule.FIFO)]
                for _ in range(rounds)
            ]
            name = f"turns8_{kind}{steps}"
            results |= {
                f"{name}_first_preview_over_fifo": statistics.median(_mean(a.looks, b.looks) for a, b in pairs),
                f"{name}_completion_over_fifo": statistics.median(_mean(a.ends, b.ends) for a, b in pairs),
                f"{name}_throughput_over_fifo": statistics.median(max(b.ends) / max(a.ends) for a, b in pairs),
            }
    return results


def _mean(above: list[float], below: list[float]) -> float:
    return statistics.mean(above) / statistics.mean(below)
