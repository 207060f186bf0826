"""The performance targets, and whether a report meets them. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.report import Report

__all__ = ["TARGETS", "Target", "judge", "table"]

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True, slots=True)
class Target:
    """A limit for a figure.

    Attributes:
        title: Its description for people.
        figures: Names of the figures, which are added up.
        at_most: Upper limit by case.
        at_least: Lower limit by case.
        divided_by: Name of a figure to divide by; none if empty.
    """

    title: str
    figures: tuple[str, ...]
    at_most: tuple[tuple[str, float], ...] = ()
    at_least: tuple[tuple[str, float], ...] = ()
    divided_by: str = ""

    def limits(self) -> list[tuple[str, str, float]]:
        """Returns case, "<=" or ">=", and the limit."""
        lower = [(case, ">=", limit) for case, limit in self.at_least]
        return [(case, "<=", limit) for case, limit in self.at_most] + lower

    def value(self, report: Report, case: str, variant: str) -> float | None:
        """Returns the figure, or None if it was not measured."""
        parts = [report.figure(case, variant, name) for name in self.figures]
        divisor = report.figure(case, variant, self.divided_by) if self.divided_by else 1
        if divisor is None or not all(_is_number(each) for each in [*parts, divisor]):
            return None
        return sum(parts) / divisor


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _all(sd15: float, sdxl: float, flux: float) -> tuple[tuple[str, float], ...]:
    return (("sd15", sd15), ("sdxl", sdxl), ("flux", flux), ("flux20", flux))


TARGETS = (
    Target("stream with a preview at every step / bare eager call", ("head_over_bare",), _all(0.6, 0.95, 1.03)),
    Target("the same / stream without previews", ("head_over_silent",), _all(1.02, 1.02, 1.01)),
    Target("first preview / one step, without prompt encoding", ("first_preview_steps",), _all(1.5, 1.3, 1.1)),
    Target(
        "8 users: throughput / FIFO with the same runtime",
        ("users8_throughput_over_fifo",),
        at_least=_all(2.5, 1.1, 0.98),
    ),
    Target(
        "8 users: mean first preview / FIFO",
        ("users8_first_preview_over_fifo",),
        (("sd15", 0.12), ("sdxl", 0.12), ("flux", 0.35), ("flux20", 0.1)),
    ),
    Target(
        "8 users: mean completion / FIFO",
        ("users8_completion_over_fifo",),
        (("flux", 1.2), ("flux20", 1.05)),
    ),
    Target("8 users: mean rows per call", ("users8_mean_rows",), at_least=(("sd15", 15),)),
    Target("cancel until the device works for another user, in steps", ("cancel_steps",), _all(1.2, 1.2, 1.2)),
    Target(
        "AUTO: share of the steps with a preview",
        ("auto_previews",),
        at_least=_all(1, 1, 1),
        divided_by="preview_steps",
    ),
    Target("AUTO / stream without previews", ("auto_over_silent",), _all(1.02, 1.02, 1.02)),
    Target(
        "final image at 1024 px: conversion and PNG, ms",
        ("final_convert_ms", "final_encode_ms"),
        (("sdxl", 60), ("flux", 60), ("flux20", 60)),
    ),
)
"""Limits by case; `flux` has 4 steps, `flux20` 20."""


def judge(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Returns (target, case with variant, limit, figure, judgement) for each limit and each variant of its case.

    A case without any figure has one row, "not measured".
    """
    judged = []
    for target in TARGETS:
        for case, comparison, limit in target.limits():
            variants = [variant for name, variant in report.columns() if name == case] or [""]
            for variant in variants:
                value = target.value(report, case, variant)
                if value is None:
                    judgement, shown = NOT_MEASURED, ""
                else:
                    met = value <= limit if comparison == "<=" else value >= limit
                    judgement, shown = MET if met else MISSED, f"{value:.3g}"
                column = f"{case} ({variant})" if variant else case
                judged.append((target.title, column, f"{comparison} {limit:g}", shown, judgement))
    return judged


def table(report: Report) -> str:
    """Returns the judgements as lines of text."""
    rows = [("target", "case", "limit", "measured", ""), *judge(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
