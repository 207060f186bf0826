"""Compares the simulation with the real server: observed and predicted results for the same arrivals."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from benchmarks.sizing import live
from benchmarks.sizing.fleet import Fleet, Model, Request, poisson, simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

SHARES = (0.4, 0.7, 0.9)
"""Arrival rates as shares of the capacity."""
SECONDS = 50
_FLEET = Fleet(1, live.MAX_ACTIVE, live.MAX_ROWS)


@dataclass(frozen=True)
class Summary:
    """The callers' results: seconds from arrival to the first preview and to the image.

    Attributes:
        first50: First preview, median.
        first95: First preview, 95th percentile.
        total50: Image, median.
        total95: Image, 95th percentile.
        throughput: Images per second that finished while requests still arrived.
        rejected: Share of rejected requests.
    """

    first50: float
    first95: float
    total50: float
    total95: float
    throughput: float
    rejected: float


@dataclass(frozen=True)
class Comparison:
    """One run.

    Attributes:
        rate: Requested generations per second.
        generations: Number of requests.
        seen: Observed results.
        predicted: Prediction from the step times of an earlier run of a busy server.
        replayed: Prediction from the step times of this run; the remaining error is that of the policies.
        others: Cores that were busy with anything other than the server and its callers.
    """

    rate: float
    generations: int
    seen: Summary
    predicted: Summary
    replayed: Summary
    others: float


def summarize(requests: Sequence[Request], skip: int = 0) -> Summary:
    """Returns the percentiles without the first `skip` requests, which found the servers empty."""
    served = [request for request in requests[skip:] if not request.rejected]
    if not served:
        return Summary(math.nan, math.nan, math.nan, math.nan, 0.0, 1.0)
    first = [request.first_preview - request.arrived for request in served]
    total = [request.finished - request.arrived for request in served]
    begin, end = served[0].arrived, requests[-1].arrived
    finished = sum(begin < request.finished <= end for request in requests)
    return Summary(
        first50=_percentile(first, 0.5),
        first95=_percentile(first, 0.95),
        total50=_percentile(total, 0.5),
        total95=_percentile(total, 0.95),
        throughput=finished / (end - begin),
        rejected=1 - len(served) / len(requests[skip:]),
    )


def validate(pretend: str = "") -> tuple[Model, list[Comparison]]:
    """Measures the busy bundled model, sends random arrivals, and predicts their results.

    Args:
        pretend: Step times of a simulated device, see `recording`; empty for the real one.
    """
    runs = []
    with live.recorded_server(pretend) as server:
        server.calls()
        seen = asyncio.run(live.busy(server.address))
        model = live.model_of(server.calls(), seen)
        for number, share in enumerate(SHARES):
            rate = share * model.capacity(live.MAX_ACTIVE, live.MAX_ROWS)
            trace = (rate, round(rate * SECONDS), number)
            with _Others() as others:
                seen = asyncio.run(live.by_chance(server.address, poisson(*trace)))
            runs.append((trace, seen, live.model_of(server.calls(), seen), others.cores))
    return model, [
        Comparison(
            rate=trace[0],
            generations=len(seen),
            seen=summarize([_on_trace(each.request, due) for each, due in zip(seen, poisson(*trace), strict=True)]),
            predicted=_predicted(model, trace),
            replayed=_predicted(own, trace),
            others=cores,
        )
        for trace, seen, own, cores in runs
    ]


def _predicted(model: Model, trace: tuple[float, int, int]) -> Summary:
    return summarize(simulate(model, _FLEET, poisson(*trace)).requests)


def _on_trace(request: Request, due: Request) -> Request:
    """Returns `due` with the times of `request`, which are relative to its arrival."""
    due.rejected = request.rejected
    due.first_preview = due.arrived + request.first_preview
    due.finished = due.arrived + request.finished
    return due


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class _Others:
    """Measures the cores that are busy with work of other processes than this one and its children."""

    cores = 0.0

    def __enter__(self) -> _Others:
        self._started = time.monotonic(), self._all(), self._own()
        return self

    def __exit__(self, *_: object) -> None:
        started, busy, own = self._started
        self.cores = ((self._all() - busy) - (self._own() - own)) / (time.monotonic() - started)

    @staticmethod
    def _all() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice

    @staticmethod
    def _own() -> float:
        this = psutil.Process()
        return sum(sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True)))
