"""Detects leaks of a process from samples taken while it works, as slopes over the number of requests.

End values alone mislead: a leak that is slow hides below the tolerance of a comparison with the start, and a pool that
fills late looks like a leak. The slope is that of Theil (1950) and Sen (1968): the median over all pairs of samples. It
ignores up to 29 % of outliers.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LIMITS", "Footprint", "LeakGate", "Trend", "trend"]

_MAX_SAMPLES = 300
"""Used for a trend; their pairs take 0.1 s."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory, threads and open files of a process."""

    resident_kib: int
    threads: int
    files: int

    @staticmethod
    def of(pid: int) -> Footprint:
        """Reads the values from the kernel."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return Footprint(int(status["VmRSS"].split()[0]), int(status["Threads"]), files)


LIMITS = {"resident_kib": 10240.0, "threads": 2.0, "files": 2.0}
"""Largest growth for each 1,000 requests. A leaked preview per request is twice as much memory."""

LEAST = {"resident_kib": 48 * 1024.0}
"""Growth that says nothing: the memory of an idle server without a leak moves between 700 and 770 MiB for minutes.

So a leak of 20 KiB per request shows after 2,500 requests.
"""


@dataclass(frozen=True, slots=True)
class Trend:
    """The growth of a value.

    Attributes:
        per_1000: Growth for each 1,000 requests.
        growth: Growth over all samples.
        noise: Median distance of the samples from the trend.
    """

    per_1000: float
    growth: float
    noise: float

    def exceeds(self, limit: float, least: float = 0.0) -> bool:
        """Whether the value grows faster than `limit` for each 1,000 requests, and by more than noise and `least`.

        Neighbouring samples resemble each other, so hundreds of them say as much as 20 independent ones. Twice the
        noise is then about two standard errors of the growth.
        """
        return self.per_1000 > limit and self.growth > max(2 * self.noise, least)


def trend(samples: Sequence[tuple[float, float]]) -> Trend:
    """Returns the trend of at least two (number of requests, value)."""
    used = samples[:: max(1, len(samples) // _MAX_SAMPLES)]
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(used, 2) if x2 > x1]
    slope = statistics.median(slopes) if slopes else 0.0
    base = statistics.median(y - slope * x for x, y in used)
    noise = statistics.median(abs(y - slope * x - base) for x, y in used)
    return Trend(1000 * slope, slope * (used[-1][0] - used[0][0]), noise)


class LeakGate:
    """Collects samples and names the values that grow.

    Args:
        warm_up: Number of requests after which caches and pools have their final size.
        limits: Growth for each 1,000 requests, by field of `Footprint`.
    """

    def __init__(self, warm_up: int, limits: dict[str, float] = LIMITS) -> None:
        self._warm_up = warm_up
        self._limits = limits
        self._samples: list[tuple[int, Footprint]] = []

    def sample(self, requests: int, footprint: Footprint) -> None:
        """Adds a sample, unless the process is still warming up."""
        if requests >= self._warm_up:
            self._samples.append((requests, footprint))

    def trends(self) -> dict[str, Trend]:
        """Returns the trend of each value; empty with fewer than ten samples."""
        if len(self._samples) < 10:
            return {}
        names = [field.name for field in fields(Footprint)]
        return {name: trend([(count, getattr(each, name)) for count, each in self._samples]) for name in names}

    def leaks(self) -> list[str]:
        """Returns a sentence for each value that grows too fast."""
        return [
            f"{name} grows by {found.per_1000:.1f} for each 1,000 requests, the limit is {self._limits[name]:g}"
            for name, found in self.trends().items()
            if found.exceeds(self._limits[name], LEAST.get(name, 0.0))
        ]

    def report(self) -> str:
        """Describes all trends on one line."""
        shown = (f"{name} {found.per_1000:+.1f} (noise {found.noise:.0f})" for name, found in self.trends().items())
        return f"growth for each 1,000 requests, from {len(self._samples)} samples: {', '.join(shown) or 'unknown'}"
