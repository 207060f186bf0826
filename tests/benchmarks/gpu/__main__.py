"""`make bench-gpu`: measures the service with models of real size and random weights; needs no hub and no files.

It prints a table and the targets, and writes build/bench-gpu.json after every section. `--toy` runs everything with
tiny models, also on a CPU: its figures show that the benchmark works, not how fast the service is.
"""

from __future__ import annotations

import argparse
import enum
import math
import os
import time
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The server sets this too; torch reads it on import, in the process that has the device.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.gpu import targets
from benchmarks.gpu.cases import MODELS, cases_of
from benchmarks.gpu.report import Report
from benchmarks.gpu.runner import SECTIONS, Plan, run
from calotype_server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUT = Path("build/bench-gpu.json")


def chosen(wanted: str, setting: str) -> list[str | None]:
    """Returns the values of a setting to measure; None stands for the server's default.

    Raises:
        ValueError: The server does not have one of the values.
    """
    available = [str(each) for each in _literals(Settings.model_fields[setting].annotation)]
    names = _split(wanted)
    unknown = [name for name in names if name not in available]
    if unknown:
        raise ValueError(f"--{setting}: this server has no {', '.join(unknown)}, only {', '.join(available)}.")
    return [*names] or [None]


def _literals(annotation: Any) -> list[Any]:
    if isinstance(annotation, enum.EnumMeta):
        return list(annotation)
    return list(typing.get_args(annotation))


def _split(text: str) -> list[str]:
    return [each for each in text.split(",") if each]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated: {', '.join(MODELS)}")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"comma-separated: {', '.join(SECTIONS)}")
    parser.add_argument("--accelerate", default="none", help="comma-separated runtimes: none, graphs, compile")
    parser.add_argument("--schedule", default="", help="comma-separated schedules; default: the server's")
    parser.add_argument("--toy", action="store_true", help="tiny models; the figures mean nothing")
    parser.add_argument("--rounds", type=int, help="measurements of each figure; default: 3, or 1 with --toy")
    parser.add_argument("--device", help="torch device; default: the server's choice")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="skip sections that do not fit")
    parser.add_argument("--resume", action="store_true", help="keep the sections that the file already has")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the file; default: {OUTPUT}")
    options = parser.parse_args(arguments)
    try:
        options.accelerates = chosen(options.accelerate, "accelerate")
        options.schedules = chosen(options.schedule, "schedule")
    except ValueError as error:
        parser.error(str(error))
    for name, known in (("models", MODELS), ("sections", SECTIONS)):
        names = _split(getattr(options, name))
        if unknown := [each for each in names if each not in known]:
            parser.error(f"--{name}: unknown: {', '.join(unknown)}")
        setattr(options, name, names)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark, and returns the exit code: 1 if a section failed."""
    options = parse(arguments)
    rounds = options.rounds or (1 if options.toy else 3)
    report = Report(
        options.output, {"toy": options.toy, "rounds": rounds, "device": options.device}, resume=options.resume
    )
    plan = Plan(
        cases=[case for model in options.models for case in cases_of(model, toy=options.toy)],
        sections=options.sections,
        accelerates=options.accelerates,
        schedules=options.schedules,
        rounds=rounds,
        device=options.device,
        deadline=time.monotonic() + options.budget_seconds,
        folder=options.output.parent / "bench-gpu",
    )
    try:
        run(plan, report, lambda line: print(line, flush=True))
    finally:
        print(f"\n{', '.join(f'{name} {value}' for name, value in report.machine.items())}\n\n{report.table()}\n")
        print("\n".join(report.problems()))
        if not options.toy:
            print(f"\n{targets.table(report)}")
    return int(any(record.status == "failed" for record in report.records))


if __name__ == "__main__":
    raise SystemExit(main())
