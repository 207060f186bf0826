"""How long a generation will take, from how long earlier ones took."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calotype_server.types import Job, Timings

__all__ = ["Pace"]

_NEWEST_WEIGHT = 0.3
"""Weight of the newest observation in the moving averages: a busy minute is forgotten after a few generations."""

_DOUBT = 0.9


class Pace:
    """Moving averages of seconds per step and of the time around the steps, both per pixel.

    Work grows about linearly with the number of pixels: exactly so in convolutions, a little faster in attention.
    """

    def __init__(self) -> None:
        self._step: float | None = None
        self._around: float | None = None

    def observe(self, job: Job, timings: Timings) -> None:
        """Learns from a generation that went through all its phases."""
        if timings.denoising is None or timings.encoding_prompt is None or timings.decoding is None:
            return
        self._step = _mix(self._step, timings.denoising / job.step_count / job.pixel_count)
        self._around = _mix(self._around, (timings.encoding_prompt + timings.decoding) / job.pixel_count)

    def doubt(self) -> None:
        """Lowers the estimates a little: work was refused because of them, so nothing else would ever correct them."""
        if self._step is not None and self._around is not None:
            self._step *= _DOUBT
            self._around *= _DOUBT

    def forget(self) -> None:
        """Starts anew."""
        self._step = self._around = None

    def total_seconds(self, job: Job) -> float | None:
        """Seconds from the start of work to the final image."""
        return self.remaining_seconds(job, 0, job.step_count)

    def remaining_seconds(self, job: Job, step: int, total_steps: int) -> float | None:
        """Seconds to the final image when `step` of `total_steps` are done."""
        if self._step is None or self._around is None:
            return None
        around = self._around if step == 0 else self._around / 2
        return (self._step * (job.step_count * (total_steps - step) / total_steps) + around) * job.pixel_count


def _mix(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST_WEIGHT * (new - old)
