"""Runs the sections of all cases and variants in order, within a time limit, and saves each result."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import checks, sections
from benchmarks.gpu.report import DONE, FAILED, SKIPPED, Record
from benchmarks.gpu.session import Bench, Session, Skipped, Variant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from benchmarks.gpu.cases import Case
    from benchmarks.gpu.report import Report

__all__ = ["SECTIONS", "Plan", "Section", "run"]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the benchmark.

    Attributes:
        name: Its name on the command line.
        measure: Returns its figures.
        images: About how many bare calls it takes for each round.
        fixed: Seconds that it takes in addition, such as the start of a server.
        bundled: Whether it measures the bundled model, and only that.
        scheduled: Whether `--schedule` changes its figures; it is repeated for each value.
        accelerated: Whether `--accelerate` changes its figures; it is repeated for each value.
    """

    name: str
    measure: Callable[[Bench], dict[str, Any]]
    images: float
    fixed: float
    bundled: bool = False
    scheduled: bool = False
    accelerated: bool = True


SECTIONS = {
    section.name: section
    for section in (
        Section("devices", checks.devices, 0, 40, bundled=True, accelerated=False),
        Section("bare", sections.bare, 2, 20, accelerated=False),
        Section("launch", sections.launch, 1, 2, accelerated=False),
        Section("plan", sections.plan, 2, 10, scheduled=True),
        Section("streams", sections.streams, 10, 12),
        Section("first-preview", sections.first_preview, 2, 1),
        Section("users", sections.users, 12, 12, scheduled=True),
        Section("cancel", sections.cancel, 3, 1),
        Section("final", sections.final_image, 2, 1),
        Section("same-image", checks.same_image, 4, 1),
        Section("rows", sections.rows, 2, 2, accelerated=False),
        Section("priority", sections.priority, 8, 5, accelerated=False),
        Section("host-timesteps", sections.host_timesteps, 4, 12),
        Section("fast", sections.fast, 4, 12),
        Section("memory", checks.memory, 5, 1),
        Section("nan", checks.nan, 1, 1),
        Section("out-of-memory", checks.out_of_memory, 5, 12),
    )
}
"""Sections by name, in the order in which they run: the most important first, those that break things last."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        cases: The cases, those of one family after each other.
        sections: Names of the sections.
        accelerates: Values of `--accelerate`; None for the server's default.
        schedules: Values of `--schedule`; None for the server's default.
        rounds: Number of measurements of each figure.
        device: Torch device, or None for the server's choice.
        deadline: Time of `time.monotonic` at which to stop; infinite for no limit.
        folder: For logs and caches.
    """

    cases: Sequence[Case]
    sections: Sequence[str]
    accelerates: Sequence[str | None]
    schedules: Sequence[str | None]
    rounds: int
    device: str | None
    deadline: float
    folder: Path

    def tasks(self, case: Case, accelerate: str | None) -> Iterable[tuple[Variant, Section]]:
        """Yields the sections of a case with one runtime."""
        for schedule in self.schedules:
            for name, section in SECTIONS.items():
                if (
                    name in self.sections
                    and section.bundled == (case.family == "bundled")
                    and (section.accelerated or accelerate == self.accelerates[0])
                    and (section.scheduled or schedule == self.schedules[0])
                ):
                    yield Variant(accelerate, schedule), section


def run(plan: Plan, report: Report, say: Callable[[str], None]) -> None:
    """Measures everything that the report does not have yet.

    A section that fails does not stop the run. `KeyboardInterrupt` does; the report then has everything until there.
    """
    for family in dict.fromkeys(case.family for case in plan.cases):
        cases = [case for case in plan.cases if case.family == family]
        for accelerate in plan.accelerates:
            # A process for each runtime: compiling may change the modules.
            with Session(family, plan.folder, toy=cases[0].toy, device=plan.device) as session:
                for case in cases:
                    benches: dict[Variant, Bench] = {}
                    for variant, section in plan.tasks(case, accelerate):
                        bench = benches.setdefault(
                            variant, Bench(session, case, variant, plan.rounds, plan.folder, plan.device)
                        )
                        _measure(plan, report, bench, section, say)


def _measure(plan: Plan, report: Report, bench: Bench, section: Section, say: Callable[[str], None]) -> None:
    case, variant = bench.case, bench.variant.title
    label = " ".join(filter(None, (case.name, variant, section.name)))
    if report.is_done(case.name, variant, section.name):
        say(f"kept: {label}")
        return
    started = time.monotonic()
    seconds = needed(report, bench, section)
    if started + seconds > plan.deadline:
        reason = f"it needs about {seconds:.0f} s, and {max(0.0, plan.deadline - started):.0f} s are left"
        record = Record(case.name, variant, section.name, SKIPPED, reason)
    else:
        try:
            figures = bench.run(section.measure)
            record = Record(case.name, variant, section.name, DONE, "", time.monotonic() - started, figures)
        except Skipped as skipped:
            record = Record(case.name, variant, section.name, SKIPPED, str(skipped))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            record = Record(case.name, variant, section.name, FAILED, reason, time.monotonic() - started)
    report.machine |= machine(bench.session)
    report.add(record)
    say(f"{record.status}: {label}" + (f": {record.reason}" if record.reason else f" ({record.seconds:.1f} s)"))


def needed(report: Report, bench: Bench, section: Section) -> float:
    """Returns about how many seconds a section takes, from the time of the bare call if that is known."""
    if bench.case.toy:
        return 0.0
    image = next(
        (
            each.figures["bare_seconds"]
            for each in report.records
            if each.case == bench.case.name and "bare_seconds" in each.figures
        ),
        0.0,
    )
    return section.fixed + section.images * (bench.rounds + 1) * image


def machine(session: Session) -> dict[str, Any]:
    """Describes the machine: CPU, and device and versions once a pipeline was built."""
    known = {name: each for name, each in session.description.items() if name in ("device", "torch", "cuda")}
    return {"cpu_cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform(), **known}
