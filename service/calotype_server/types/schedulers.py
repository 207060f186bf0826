"""Options of schedulers (samplers)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["SchedulerInfo", "Sigmas", "TimestepSpacing"]


class Sigmas(IntEnum):
    """Noise levels of the denoising steps.

    Attributes:
        KARRAS: Karras et al. 2022, arXiv 2206.00364, equation 5.
        EXPONENTIAL: Evenly spaced logarithms.
        BETA: Quantiles of a beta distribution; arXiv 2407.12173.
    """

    KARRAS = 1
    EXPONENTIAL = 2
    BETA = 3


class TimestepSpacing(IntEnum):
    """Spacing of the timesteps; table 2 of arXiv 2305.08891.

    Attributes:
        LEADING: Starts slightly below the last timestep of the training.
        TRAILING: Starts at the last timestep of the training.
        LINSPACE: Evenly spaced from the last timestep to the first.
    """

    LEADING = 1
    TRAILING = 2
    LINSPACE = 3


@dataclass(frozen=True, slots=True)
class SchedulerInfo:
    """A scheduler that a model supports.

    Attributes:
        name: Class name of diffusers.
        aliases: Familiar names of this scheduler with fixed options, such as "DPM++ 2M Karras".
        sigmas: Noise levels that requests may choose with it.
        spacings: Spacings that requests may choose with it.
    """

    name: str
    aliases: tuple[str, ...] = ()
    sigmas: tuple[Sigmas, ...] = ()
    spacings: tuple[TimestepSpacing, ...] = ()
