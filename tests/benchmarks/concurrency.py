"""Compares step batching with one generation after another, and with threads that share the denoiser."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import calotype
from benchmarks.runs import STEPS
from support.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPTS = ("a red apple", "fox", "banana", "umbrella", "cookie", "broken heart", "alien", "strawberry")
STREAMS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Measured:
    """One stream: seconds from the common start to the first preview and to the end, and the error of the estimate."""

    first_preview: float
    finished: float
    estimate_error: float | None


def measure(rounds: int, threads: int) -> dict[str, float]:
    """Returns throughput and time to the first preview of 1, 2, 4 and 8 streams, relative to FIFO and naive servers.

    The three servers run side by side, and each number of streams is measured on all of them in turn.

    Args:
        rounds: Number of measurements; the median counts.
        threads: Fastest number of torch threads for single calls, used by the two servers that do not batch. The
            batching server chooses its own number for batched calls.
    """
    options = ("--log-level", "warning")
    results: dict[str, float] = {}
    with (
        ServerProcess(*options) as batching,
        ServerProcess(*options, "--threads", str(threads), "--max-active", "1") as fifo,
        naive_server() as naive,
    ):
        addresses = {"batching": batching.address, "fifo": fifo.address, "naive": naive}
        for streams in STREAMS:
            runs: dict[str, list[list[Measured]]] = {name: [] for name in addresses}
            for number in range(rounds + 1):
                for name, address in addresses.items():
                    measured = asyncio.run(together(address, streams))
                    if number:  # the first round warms up
                        runs[name].append(measured)
            results |= compared(runs, streams)
    return results


def compared(runs: dict[str, list[list[Measured]]], streams: int) -> dict[str, float]:
    """Returns the medians of the ratios within each round."""
    results = {}
    for other in ("fifo", "naive"):
        pairs = list(zip(runs["batching"], runs[other], strict=True))
        results[f"throughput{streams}_over_{other}"] = statistics.median(seconds(b) / seconds(a) for a, b in pairs)
        results[f"first_preview{streams}_over_{other}"] = statistics.median(first(a) / first(b) for a, b in pairs)
        results[f"first_preview{streams}_max_over_{other}"] = statistics.median(
            slowest(a) / slowest(b) for a, b in pairs
        )
    for name, rounds in runs.items():
        results[f"{name}{streams}_images_per_second"] = statistics.median(streams / seconds(run) for run in rounds)
    errors = [each.estimate_error for run in runs["batching"] + runs["fifo"] for each in run]
    known = [error for error in errors if error is not None]
    if known:
        results[f"estimate{streams}_error"] = statistics.median(known)
    return results


async def together(address: str, streams: int) -> list[Measured]:
    """Starts `streams` generations at once and follows each to its end."""
    async with calotype.AsyncClient(address) as client:
        started = time.perf_counter()

        async def one(index: int) -> Measured:
            first_preview, estimate = None, None
            generation = client.generate(PROMPTS[index % len(PROMPTS)], seed=index, steps=STEPS)
            async for progress in generation:
                now = time.perf_counter() - started
                if estimate is None and progress.estimated_remaining is not None:
                    estimate = now + progress.estimated_remaining
                if first_preview is None and progress.preview is not None:
                    first_preview = now
            finished = time.perf_counter() - started
            error = None if estimate is None else abs(estimate - finished) / finished
            return Measured(first_preview, finished, error)

        return await asyncio.gather(*(one(index) for index in range(streams)))


def seconds(run: list[Measured]) -> float:
    """Returns the seconds until all streams have finished."""
    return max(each.finished for each in run)


def first(run: list[Measured]) -> float:
    """Returns the mean time to the first preview."""
    return statistics.mean(each.first_preview for each in run)


def slowest(run: list[Measured]) -> float:
    """Returns the longest time to the first preview."""
    return max(each.first_preview for each in run)


@contextlib.contextmanager
def naive_server() -> Iterator[str]:
    """Runs `benchmarks.naive` and yields its address."""
    command = [sys.executable, "-m", "benchmarks.naive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("127.0.0.1:"):
                break
        else:
            raise AssertionError("the naive server did not start")
        yield line.strip()
        process.stdin.close()
