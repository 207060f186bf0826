"""In which order running generations get their steps."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Schedule"]


class Schedule(StrEnum):
    """Which running generation gets the next step if not all of them fit into one call of the denoiser.

    Attributes:
        FIRST_LOOK: One that has not finished its first step, then the one that started first.
        FAIR: The one that has waited longest for its step, so all progress evenly.
        FIFO: The one that started first.
    """

    FIRST_LOOK = "first-look"
    FAIR = "fair"
    FIFO = "fifo"
