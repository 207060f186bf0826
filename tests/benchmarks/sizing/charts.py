"""Draws the results of the simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt

from benchmarks.sizing.fleet import Fleet, Model, Routing, poisson, simulate
from benchmarks.sizing.validation import Summary, summarize

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from pathlib import Path

SHARES = (0.2, 0.4, 0.6, 0.75, 0.85, 0.95, 1.1)
"""Arrival rates as shares of the capacity of the replicas with each batch limit."""
LIMITS = (1, 2, 4, 8)
REPLICAS = (1, 8, 64, 512, 2048)
FEW = 16
FLEET_SHARE = 0.85
SEED = 1
_EACH = 30
"""Minimum number of generations per replica; the first third is not counted."""
_LEAST = 1200
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00")  # Okabe & Ito: colour-blind safe
_INK = "#333333"

Point = tuple[Model, Fleet, float]


def run(point: Point) -> Summary:
    """Simulates one point: a model, a fleet, and the rate of arrivals."""
    model, fleet, rate = point
    count = max(_LEAST, _EACH * fleet.replicas)
    return summarize(simulate(model, fleet, poisson(rate, count, SEED), seed=SEED).requests, skip=count // 3)


def by_load(model: Model, pool: Executor) -> dict[int, list[tuple[float, Summary]]]:
    """Returns the callers' results by batch limit, for each arrival rate per replica."""
    points = {}
    for limit in LIMITS:
        capacity = FEW * model.capacity(limit, limit * model.rows)
        points[limit] = [(model, Fleet(FEW, limit, limit * model.rows), share * capacity) for share in SHARES]
    return {
        limit: [(rate / FEW, seen) for (_, _, rate), seen in zip(each, pool.map(run, each), strict=True)]
        for limit, each in points.items()
    }


def by_replicas(model: Model, pool: Executor) -> dict[Routing, list[tuple[int, Summary]]]:
    """Returns the callers' results by routing, for each number of replicas, with the same load per replica."""
    limit = LIMITS[-1]
    rate = FLEET_SHARE * model.capacity(limit, limit * model.rows)
    points = {
        routing: [(model, Fleet(count, limit, limit * model.rows, routing=routing), rate * count) for count in REPLICAS]
        for routing in Routing
    }
    return {routing: list(zip(REPLICAS, pool.map(run, each), strict=True)) for routing, each in points.items()}


def draw_load(model: Model, found: dict[int, list[tuple[float, Summary]]], title: str, path: Path) -> None:
    """Draws first preview and throughput over the arrival rate, with one colour per batch limit.

    Above the capacity, waiting times grow without limit, so they are not drawn.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for colour, (limit, points) in zip(_COLOURS, found.items(), strict=True):
        rates = [rate for rate, _ in points]
        label = "one at a time" if limit == 1 else f"up to {limit} together"
        capacity = model.capacity(limit, limit * model.rows)
        steady = [(rate, seen) for rate, seen in points if rate < capacity]
        for style, value in (("-", "first50"), (":", "first95")):
            values = [getattr(seen, value) for _, seen in steady]
            left.plot([rate for rate, _ in steady], values, color=colour, marker="o", ms=4, ls=style)
        served = [seen.throughput / FEW for _, seen in points]
        right.plot(rates, served, color=colour, marker="o", ms=4, label=label)
    ends = [0, max(rate for points in found.values() for rate, _ in points)]
    right.plot(ends, ends, color="#999999", lw=1, ls="--", label="all arrivals")
    left.set_yscale("log")
    _name(left, "first preview, s  (solid: median, dotted: 95 of 100)")
    _name(right, "images per second and replica")
    for axes in (left, right):
        axes.set_xlabel("arrivals per second and replica")
        axes.set_xlim(left=0)
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    _finish(figure, title, path)


def draw_replicas(found: dict[Routing, list[tuple[int, Summary]]], title: str, path: Path) -> None:
    """Draws first preview and throughput over the number of replicas, with one colour per routing."""
    names = {
        Routing.ROUND_ROBIN: "in turn (one client's round_robin)",
        Routing.RANDOM: "at random (many clients, each round_robin)",
        Routing.LEAST: "fewest calls (a bridge)",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (routing, points), colour, marker in zip(found.items(), _COLOURS, "so^", strict=False):
        counts = [count for count, _ in points]
        style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 5, "mfc": "none"}
        left.plot(counts, [seen.first50 for _, seen in points], label=names[routing], **style)
        left.plot(counts, [seen.first95 for _, seen in points], ls=":", **style)
        right.plot(counts, [seen.throughput for _, seen in points], label=names[routing], **style)
    _name(left, "first preview, s  (solid: median, dotted: 95 of 100)")
    _name(right, "images per second, all replicas")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(REPLICAS, [str(count) for count in REPLICAS])
        axes.set_xlabel("replicas")
        axes.set_yscale("log")
    right.legend(frameon=False)
    _finish(figure, title, path)


def _name(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=_INK)
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Omits the version of the library, so that the same results give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
