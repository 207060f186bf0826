"""Urgency: which of several requests comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server.types import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from calotype_server.engine.batching.pending import PendingCall, RequestSlot

__all__ = ["LOOKS_IN_A_ROW", "Urgency"]

LOOKS_IN_A_ROW = 16
"""Batches for first steps that may run in a row while other requests wait: twice the default of running generations."""


class Urgency:
    """Orders requests. It counts first steps, so that they cannot delay the other requests without limit.

    Args:
        schedule: `FIRST_LOOK` or `FIFO`.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._looks_left = LOOKS_IN_A_ROW if schedule is Schedule.FIRST_LOOK else 0
        self._most_looks = self._looks_left

    def rank(self, slot: RequestSlot) -> tuple[bool, int]:
        """Returns the sort key of a request; the smallest one is most urgent."""
        return slot.looked or self._looks_left == 0, slot.number

    def note_batch(self, taken: Sequence[PendingCall], left: Iterable[PendingCall]) -> None:
        """Records the calls that run now, most urgent first, and those that wait."""
        overtaken = not taken[0].slot.looked and any(pending.slot.looked for pending in left)
        self._looks_left = max(0, self._looks_left - 1) if overtaken else min(self._most_looks, self._looks_left + 1)
