"""Decides at which steps a generation shows a preview."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import PreviewOptions

__all__ = ["PreviewSchedule"]


class PreviewSchedule:
    """Decides at which steps to show a preview.

    Args:
        options: The caller's options.
        clock: Returns seconds that never decrease.
    """

    def __init__(self, options: PreviewOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        self._shown_step: int | None = None
        self._shown_at = 0.0

    def due(self, step: int, total: int, stride: int) -> bool:
        """Returns whether to show `step` of `total`. Call it once for each step, in order.

        Args:
            step: Number of the step, from 1.
            total: Number of all steps; the last one is always due.
            stride: Smallest number of steps between two previews that the budget allows.
        """
        now = self._clock()
        if step < total:
            if step % self._options.every_steps:
                return False
            if self._shown_step is not None and (
                step - self._shown_step < stride or now - self._shown_at < self._options.min_interval
            ):
                return False
        self._shown_step, self._shown_at = step, now
        return True
