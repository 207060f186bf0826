"""Options of schedulers that requests may choose."""

from __future__ import annotations

import inspect
from typing import Any

from calotype_server.engine.schedulers.names import missing_package
from calotype_server.types import Sigmas, TimestepSpacing

__all__ = ["sigma_options", "sigmas_of", "spacings_of"]

_SIGMAS = {
    Sigmas.KARRAS: "use_karras_sigmas",
    Sigmas.EXPONENTIAL: "use_exponential_sigmas",
    Sigmas.BETA: "use_beta_sigmas",
}

_ALL_SIGMAS = (*_SIGMAS.values(), "use_lu_lambdas")

_WITHOUT_SPACINGS = {
    # They accept `timestep_spacing`, but ignore it.
    "LCMScheduler": tuple(TimestepSpacing),
    "TCDScheduler": tuple(TimestepSpacing),
    # Their steps are shorter than the distance of these timesteps.
    "DDIMParallelScheduler": (TimestepSpacing.LINSPACE,),
    "DDIMScheduler": (TimestepSpacing.LINSPACE,),
    "PNDMScheduler": (TimestepSpacing.LINSPACE,),
}


def sigmas_of(kind: type[Any]) -> tuple[Sigmas, ...]:
    """Returns the noise levels that a class of diffusers supports with the packages that are installed."""
    accepted = inspect.signature(kind.__init__).parameters
    return tuple(each for each, name in _SIGMAS.items() if name in accepted and missing_package(each) is None)


def spacings_of(kind: type[Any]) -> tuple[TimestepSpacing, ...]:
    """Returns the spacings that a class of diffusers supports."""
    accepted = inspect.signature(kind.__init__).parameters
    if "timestep_spacing" not in accepted:
        return ()
    return tuple(each for each in TimestepSpacing if each not in _WITHOUT_SPACINGS.get(kind.__name__, ()))


def sigma_options(kind: type[Any], sigmas: Sigmas | None) -> dict[str, bool]:
    """Returns the options of a class for these noise levels, at most one of which is on; None: the plain ones."""
    accepted = inspect.signature(kind.__init__).parameters
    return {name: name == _SIGMAS.get(sigmas) for name in _ALL_SIGMAS if name in accepted}  # type: ignore[arg-type]
