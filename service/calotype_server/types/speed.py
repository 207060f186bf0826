"""Speed against fidelity: `Speed.FAST` computes only some denoising steps and forecasts the others."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final

__all__ = ["FAST_MIN_STEPS", "Speed", "computed_steps", "forecast_steps"]

FAST_MIN_STEPS: Final = 16
"""Steps from which `Speed.FAST` has an effect. With fewer, the answers of two steps differ too much to forecast."""

_TWO_IN_A_ROW_STEPS = 24
"""Steps from which two steps in a row are forecast, not only one."""

_START_SHARE, _END_SHARE = 0.2, 0.06
"""Shares of the steps at the start, where the image is composed, and at the end, where details form: always computed.
The steps at the start include those that the first forecast needs."""


class Speed(IntEnum):
    """Which denoising steps are computed."""

    EXACT = 1
    """All."""
    FAST = 2
    """Some: see `forecast_steps`. The image is close to the exact one, but not equal."""


def forecast_steps(total: int) -> frozenset[int]:
    """Returns the steps, numbered from 0, that `Speed.FAST` forecasts instead of computing them.

    They depend on nothing but the number of steps. So an image does not depend on measurements or on other requests.

    Args:
        total: Number of all denoising steps.
    """
    if total < FAST_MIN_STEPS:
        return frozenset()
    in_a_row = 1 if total < _TWO_IN_A_ROW_STEPS else 2
    start, end = math.ceil(_START_SHARE * total), total - math.ceil(_END_SHARE * total)
    return frozenset(step for step in range(start, end) if (step - start) % (in_a_row + 1) < in_a_row)


def computed_steps(done: int, total: int) -> int:
    """Returns how many of the first `done` of `total` steps `Speed.FAST` computes."""
    return done - sum(step < done for step in forecast_steps(total))
