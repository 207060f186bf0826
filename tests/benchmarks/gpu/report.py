"""The results: saved as JSON after every section, and printed as a table. Does not import torch."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

__all__ = ["DONE", "FAILED", "ROWS", "SKIPPED", "Record", "Report"]

DONE, SKIPPED, FAILED = "done", "skipped", "failed"

FORMAT = 1
"""Increase it when the file changes its meaning; a run does not resume a file of another format."""


@dataclass(frozen=True, slots=True)
class Record:
    """The outcome of one section.

    Attributes:
        case: Name of the case.
        variant: Settings of the server that differ from its defaults, such as "graphs, fifo".
        section: Name of the section.
        status: `DONE`, `SKIPPED` or `FAILED`.
        reason: Why it was skipped or failed.
        seconds: Its duration.
        figures: Numbers or texts by name.
    """

    case: str
    variant: str
    section: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """Identifies the record in a report."""
        return self.case, self.variant, self.section


class Report:
    """All records of a run.

    Args:
        path: The file; its folder is created.
        options: Options of the run that change the figures. A run with other options does not resume the file.
        resume: Whether to keep the sections that the file has as done.

    Attributes:
        machine: Names of the device, the CPU cores and the versions.

    Raises:
        ValueError: `resume`, and the file has another format or other options.
    """

    def __init__(self, path: Path, options: dict[str, Any], *, resume: bool = False) -> None:
        self._path = path
        self._options = options
        self._records: dict[tuple[str, str, str], Record] = {}
        self.machine: dict[str, Any] = {}
        if resume and path.exists():
            self._load()

    def _load(self) -> None:
        saved = json.loads(self._path.read_text(encoding="utf-8"))
        if saved.get("format") != FORMAT or saved.get("options") != self._options:
            raise ValueError(f"{self._path} has other options or another format; remove it, or run without --resume.")
        self.machine = saved["machine"]
        for each in saved["records"]:
            if each["status"] == DONE:
                record = Record(**each)
                self._records[record.key] = record

    @property
    def records(self) -> list[Record]:
        """All records in the order in which they were added."""
        return list(self._records.values())

    def is_done(self, case: str, variant: str, section: str) -> bool:
        """Whether this section was measured."""
        record = self._records.get((case, variant, section))
        return record is not None and record.status == DONE

    def figure(self, case: str, variant: str, name: str) -> Any:
        """Returns a figure of any section, or None."""
        for record in self._records.values():
            if (record.case, record.variant) == (case, variant) and name in record.figures:
                return record.figures[name]
        return None

    def columns(self) -> list[tuple[str, str]]:
        """Returns the cases and variants that have figures."""
        return list(dict.fromkeys((each.case, each.variant) for each in self.records if each.status == DONE))

    def add(self, record: Record) -> None:
        """Adds or replaces a record, and saves the file: a crash at any moment leaves this or the previous version."""
        self._records.pop(record.key, None)
        self._records[record.key] = record
        content = {
            "format": FORMAT,
            "options": self._options,
            "machine": self.machine,
            "records": [asdict(each) for each in self.records],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(_finite(content), file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def table(self) -> str:
        """Returns the figures as a Markdown table: a row for each figure, a column for each case and variant."""
        columns = self.columns()
        if not columns:
            return "No section is done."
        titles = [f"{case} ({variant})" if variant else case for case, variant in columns]
        lines = [["", *titles]]
        for title, show in ROWS:
            cells = [show(_Column(self, *column)) for column in columns]
            if any(cells):
                lines.append([title, *cells])
        return _markdown(lines)

    def problems(self) -> list[str]:
        """Returns a line for each section that was skipped or failed."""
        return [
            f"{each.status}: {' '.join(filter(None, each.key))}: {each.reason}"
            for each in self.records
            if each.status != DONE
        ]


def _finite(value: Any) -> Any:
    """Returns the value with numbers of six digits, and null instead of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def text(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


@dataclass(frozen=True, slots=True)
class _Column:
    report: Report
    case: str
    variant: str

    def __call__(self, name: str, form: str = ".2f", unit: str = "") -> str:
        value = self.report.figure(self.case, self.variant, name)
        if value is None:
            return ""
        return f"{value:{form}}{unit}" if isinstance(value, (int, float)) else str(value)

    def joined(self, text: str, *figures: tuple[str] | tuple[str, str]) -> str:
        """Returns `text` with a `{}` for each figure and its format, or nothing if one is missing."""
        values = [self(*each) for each in figures]
        return text.format(*values) if all(values) else ""

    def by_rows(self, prefix: str) -> str:
        """Returns "2: 27.8, 4: 29.4" from the figures whose names have the prefix, the rows, and `_ms`."""
        found = {}
        for record in self.report.records:
            if (record.case, record.variant) == (self.case, self.variant):
                for name, value in record.figures.items():
                    count = name.removeprefix(prefix).partition("_")[0]
                    if name.startswith(prefix) and count.isdigit():
                        found[int(count)] = value
        return ", ".join(f"{count}: {found[count]:.3g}" for count in sorted(found))


def _ratio(name: str) -> Callable[[_Column], str]:
    return lambda column: column(name)


ROWS: tuple[tuple[str, Callable[[_Column], str]], ...] = (
    ("bare pipeline call", lambda c: c("bare_seconds", ".3f", " s")),
    ("stream without previews / bare", _ratio("silent_over_bare")),
    ("stream without previews from a server with one slot / bare", _ratio("alone_over_bare")),
    ("preview at every step (head) / bare", _ratio("head_over_bare")),
    ("preview at every step (head) / without previews", _ratio("head_over_silent")),
    (
        "AUTO / without previews; previews shown",
        lambda c: c.joined("{}; {} of {}", ("auto_over_silent",), ("auto_previews", ".0f"), ("preview_steps", ".0f")),
    ),
    ("full VAE at every step / without previews", _ratio("full_vae_over_silent")),
    ("the usual callback (full VAE and JPEG inside) / bare", _ratio("callback_over_bare")),
    (
        "first preview after encoding the prompt, in steps (encoding)",
        lambda c: c.joined("{} ({})", ("first_preview_steps",), ("encoding_steps",)),
    ),
    (
        "one bare step; Python's time to launch a call; device time of a call",
        lambda c: c.joined("{} ms; {} ms; {} ms", ("step_ms", ".1f"), ("launch_ms", ".1f"), ("device_ms", ".1f")),
    ),
    ("ms per eager call by number of rows", lambda c: c.by_rows("rows_")),
    ("ms per served call by number of rows, 8 users", lambda c: c.by_rows("users8_call_of_")),
    (
        "chosen by the plan: active, rows",
        lambda c: c.joined("{}, {}", ("max_active", ".0f"), ("max_batch_rows", ".0f")),
    ),
    ("active runtime", lambda c: c("accelerator")),
    ("8 users: throughput / FIFO", _ratio("users8_throughput_over_fifo")),
    ("8 users: mean time to first preview / FIFO", _ratio("users8_first_preview_over_fifo")),
    ("8 users: slowest first preview / FIFO", _ratio("users8_slowest_first_preview_over_fifo")),
    ("8 users: mean completion / FIFO", _ratio("users8_completion_over_fifo")),
    ("8 users: mean rows per call", lambda c: c("users8_mean_rows", ".1f")),
    (
        "cancel until the device works for another user, in steps (until the server says so)",
        lambda c: c.joined("{} ({})", ("cancel_steps",), ("cancel_phase_steps",)),
    ),
    (
        "final image after the last step (VAE, conversion, PNG)",
        lambda c: c.joined(
            "{} ms ({}, {}, {})",
            ("final_ms", ".0f"),
            ("final_vae_ms", ".0f"),
            ("final_convert_ms", ".0f"),
            ("final_encode_ms", ".0f"),
        ),
    ),
    (
        "priority of previews: that of the denoiser, higher, lower: steps with the head / without previews",
        lambda c: c.joined("{}, {}, {}", *((f"priority_head_{name}",) for name in ("default", "high", "low"))),
    ),
    (
        "the same: time from a step to its preview, in steps",
        lambda c: c.joined("{}, {}, {}", *((f"priority_head_latency_{name}",) for name in ("default", "high", "low"))),
    ),
    (
        "stream without previews, timesteps on the device, in ordinary memory / bare",
        lambda c: c.joined("{}, {}", ("host_timesteps_off_over_bare",), ("host_timesteps_on_over_bare",)),
    ),
    (
        "speed FAST / all steps; computed steps",
        lambda c: c.joined("{}; {} of {}", ("fast_over_exact",), ("fast_computed_steps", ".0f"), ("fast_steps", ".0f")),
    ),
    (
        "memory of weights; peak with 1 user, with 8",
        lambda c: c.joined("{}; {}, {} GiB", ("weights_gib", ".1f"), ("peak_1_gib", ".1f"), ("peak_8_gib", ".1f")),
    ),
    (
        "same seed, levels of 255 apart: bare call, again, with head, with full VAE, among four",
        lambda c: c.joined(
            "{}, {}, {}, {}, {}",
            *((f"same_{name}_levels", ".0f") for name in ("bare", "again", "head", "full_vae", "among_four")),
        ),
    ),
    (
        "bundled model in float32, device and CPU: levels of 255 apart, PSNR",
        lambda c: c.joined("{}, {} dB", ("device_over_cpu_levels", ".0f"), ("device_over_cpu_psnr", ".0f")),
    ),
    (
        "NaN: reason; the next request succeeds",
        lambda c: c.joined("{}; {}", ("nan_reason",), ("nan_next_succeeds", ".0f")),
    ),
    (
        "out of memory: reason; another user, the next request succeed",
        lambda c: c.joined("{}; {}, {}", ("oom_reason",), ("oom_other_succeeds", ".0f"), ("oom_next_succeeds", ".0f")),
    ),
)
"""Rows of the table: the title, and a function that returns the text of a cell, or nothing."""
