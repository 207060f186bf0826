"""Sizes a fleet: `make sizing`.

Without options it draws service/sizing_load.png and service/sizing_fleet.png for the bundled model, from the
measurements in measured.json next to this file; `--measure` measures again, on this machine. With `--step-ms` it draws
the charts of another model into build/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.sizing import charts, costs, steps, validation
from benchmarks.sizing.fleet import Model, parse_step_ms

MEASURED = Path(__file__).with_name("measured.json")
PRETENDED = "2:100,4:120,8:180,16:320"
"""A simulated device that leaves the processor alone: see `recording`."""


def main() -> None:
    """Measures if requested, simulates, draws the charts, and prints their values."""
    options = _options()
    if options.measure:
        MEASURED.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    if options.step_ms is None:
        made = json.loads(MEASURED.read_text(encoding="utf-8"))["steps"]
        model = Model(**{**made, "step_seconds": tuple(map(tuple, made["step_seconds"]))})
        name, folder = "the bundled model on one core each, step times as measured", Path("service")
    else:
        milliseconds = {name: getattr(options, name) / 1e3 for name in ("encoding", "decoding", "between", "preview")}
        model = Model(options.step_ms, steps=options.steps, rows=options.rows, shared=True, **milliseconds)
        name, folder = f"step times as given, {model.steps} steps", Path("build")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        load, fleet = charts.by_load(model, pool), charts.by_replicas(model, pool)
    charts.draw_load(model, load, f"{charts.FEW} replicas, simulated: {name}", folder / "sizing_load.png")
    title = f"Arrivals at {charts.FLEET_SHARE:.0%} of the capacity, simulated: {name}"
    charts.draw_replicas(fleet, title, folder / "sizing_fleet.png")
    print(f"{'':34} {'first preview, s':>17} {'image, s':>15} {'per second':>10} {'rejected':>8}")
    for limit, points in load.items():
        for rate, seen in points:
            _print(f"up to {limit} together, {rate:.2f}/s each", seen)
    for routing, counts in fleet.items():
        for count, seen in counts:
            _print(f"{count} replicas, {routing}", seen)
    print(f"wrote {folder}/sizing_load.png and {folder}/sizing_fleet.png")


def measure() -> dict[str, object]:
    """Returns all numbers of SIZING.md by name."""
    results: dict[str, object] = {"steps": dataclasses.asdict(steps.measure())}
    for name, pretend in (("bundled", ""), ("pretended", PRETENDED)):
        model, comparisons = validation.validate(pretend)
        results[name] = {
            "model": dataclasses.asdict(model),
            "comparisons": [dataclasses.asdict(each) for each in comparisons],
        }
    return {**results, "costs": costs.measure()}


def _print(what: str, seen: validation.Summary) -> None:
    print(
        f"{what:34} {seen.first50:8.2f} {seen.first95:8.2f} {seen.total50:7.2f} {seen.total95:7.2f} "
        f"{seen.throughput:10.2f} {seen.rejected:8.1%}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make sizing", description=__doc__)
    parser.add_argument(
        "--measure", action="store_true", help="measure the bundled model and all costs on this machine"
    )
    parser.add_argument("--step-ms", type=parse_step_ms, help="step times of another model: ROWS:MS,ROWS:MS,...")
    parser.add_argument("--steps", type=int, default=28, help="steps of a generation")
    parser.add_argument("--rows", type=int, default=1, help="rows of a generation in a batch: 2 with guidance")
    parser.add_argument("--encoding", type=float, default=0.0, help="ms on the device before the first step")
    parser.add_argument("--decoding", type=float, default=0.0, help="ms on the device after the last step")
    parser.add_argument(
        "--between", type=float, default=0.5, help="ms from a step to the next, per generation in the batch"
    )
    parser.add_argument("--preview", type=float, default=10.0, help="ms from a step to its preview")
    return parser.parse_args()


if __name__ == "__main__":
    main()
