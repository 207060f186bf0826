"""Measures how much of a step is spent on launching its kernels from Python, which is the time that a graph saves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Launch", "measure_launch", "worth_capturing"]

_LEAST_SHARE = 0.7
"""Below it, published gains are within a few percent, and a graph of a large model can even be slower."""
_REPEATS = 3


class Launch(NamedTuple):
    """Durations of one call, in seconds.

    Attributes:
        launch_seconds: Until the call returns to Python.
        step_seconds: Until the device has computed it.
    """

    launch_seconds: float
    step_seconds: float


def worth_capturing(launch_seconds: float, step_seconds: float) -> bool:
    """Returns whether a graph can make a step considerably faster: launching takes at least 70 % of it.

    Args:
        launch_seconds: Time to launch a step, from 0.
        step_seconds: Time until the step is computed, more than 0.
    """
    return launch_seconds >= _LEAST_SHARE * step_seconds


def measure_launch(
    compute: Callable[[], object], synchronize: Callable[[], None], *, clock: Callable[[], float] = time.perf_counter
) -> Launch:
    """Returns the durations of the fastest of three calls, after one to warm up.

    Args:
        compute: Launches a step.
        synchronize: Waits until everything launched is computed.
        clock: Returns the time in seconds.
    """
    compute()
    found = []
    for _ in range(_REPEATS):
        synchronize()
        started = clock()
        compute()
        launched = clock()
        synchronize()
        found.append(Launch(launched - started, clock() - started))
    return min(found, key=lambda launch: launch.step_seconds)
