"""Measures the real server with the bundled model: its step times, and the callers' results with random arrivals."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import calotype
from benchmarks.runs import STEPS
from benchmarks.sizing.fleet import Model, Request
from support.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_ACTIVE, MAX_ROWS = 8, 16
OPTIONS = ("--threads", "1", "--max-active", str(MAX_ACTIVE), "--max-batch-rows", str(MAX_ROWS))
"""One core computes steps, the other does everything else. The server measures nothing at load."""

_PROMPTS = ("a red apple", "fox", "banana", "umbrella", "cookie", "broken heart", "alien", "strawberry")
_ROWS = 2
"""Rows of one generation, which uses guidance."""
_GENERATIONS = 3
"""Generations of each caller that is always busy."""
_LEAST_CALLS = 5
"""Minimum number of calls for a mean."""

Call = tuple[float, float, int, list[int]]
"""See `recording`."""


@dataclass(frozen=True)
class Seen:
    """One generation, in seconds: its request with the times at the caller, and the server's time for it."""

    request: Request
    encoding: float
    decoding: float


class RecordedServer:
    """The server and the recorded calls of its denoiser."""

    def __init__(self, address: str, path: Path) -> None:
        self.address = address
        self._path = path
        self._read = 0

    def calls(self) -> list[Call]:
        """Returns the calls since the last use of this method."""
        lines = self._path.read_text(encoding="utf-8").splitlines()
        new, self._read = lines[self._read :], len(lines)
        return [tuple(json.loads(line)) for line in new]


@contextlib.contextmanager
def recorded_server(pretend: str = "") -> Iterator[RecordedServer]:
    """Runs `recording`, with a simulated device if `pretend` gives its step times."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calls")

        class Server(ServerProcess):
            calotype = (sys.executable, "-m", "benchmarks.sizing.recording", str(path))

        with Server("--log-level", "warning", *OPTIONS, PRETEND_STEP_MS=pretend) as server:
            yield RecordedServer(server.address, path)


async def busy(address: str) -> list[Seen]:
    """Runs one, then two, four and eight generations at a time."""
    seen: list[Seen] = []
    async with calotype.AsyncClient(address) as client:

        async def draw() -> None:
            for _ in range(_GENERATIONS):
                seen.append(await generate(client, len(seen), time.monotonic()))

        for count in (1, 2, 4, 8):
            await asyncio.gather(*(draw() for _ in range(count)))
    return seen


async def by_chance(address: str, requests: Sequence[Request]) -> list[Seen]:
    """Sends each request at its arrival time."""
    async with calotype.AsyncClient(address, retries=0) as client:
        started = time.monotonic()

        async def come(number: int) -> Seen:
            due = started + requests[number].arrived
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            return await generate(client, number, due)

        return await asyncio.gather(*(come(number) for number in range(len(requests))))


async def generate(client: calotype.AsyncClient, number: int, due: float) -> Seen:
    """Follows one generation; its times are relative to `due`."""
    request = Request(0.0)
    generation = client.generate(_PROMPTS[number % len(_PROMPTS)], seed=number, steps=STEPS)
    try:
        async for progress in generation:
            now = time.monotonic() - due
            if progress.preview is not None and math.isnan(request.first_preview):
                request.first_preview = now
        request.finished = now
    except calotype.Overloaded:
        request.rejected = True
        return Seen(request, math.nan, math.nan)
    timings = generation.progress.timings
    request.started = timings.queued
    return Seen(request, timings.encoding_prompt, timings.decoding)


def model_of(calls: Sequence[Call], seen: Sequence[Seen]) -> Model:
    """Builds a model from the mean time of each part, which determines throughput even on a busy machine."""
    seconds: dict[int, list[float]] = defaultdict(list)
    gaps = []
    for (began, took, _, streams), (next_began, next_took, rows, next_streams) in itertools.pairwise(calls):
        seconds[rows].append(next_took)
        if set(streams) == set(next_streams):  # otherwise the batch may have waited for a request
            gaps.append((next_began - began - took) / len(streams))
    means = {rows: statistics.mean(each) for rows, each in sorted(seconds.items()) if len(each) >= _LEAST_CALLS}
    served = [each for each in seen if not each.request.rejected]
    encoding = statistics.mean(each.encoding for each in served)
    least = min(each.request.first_preview - each.request.started for each in served)
    return Model(
        # More rows never take less time; if the means disagree, the machine was busy.
        tuple((rows, max(each for fewer, each in means.items() if fewer <= rows)) for rows in means),
        steps=STEPS,
        rows=_ROWS,
        between=statistics.mean(gaps),
        encoding=encoding,
        decoding=statistics.mean(each.decoding for each in served),
        preview=max(0.0, least - min(each.encoding for each in served) - min(min(each) for each in seconds.values())),
        shared=False,
    )
