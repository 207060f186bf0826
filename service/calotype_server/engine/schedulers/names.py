"""Familiar names of schedulers, as in Automatic1111's web UI, ComfyUI and InvokeAI.

A name stands for a class of diffusers with fixed options. The names below are those of Automatic1111's web UI. The
other spellings differ in case, separators and abbreviations, which `read_name` removes.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from calotype_server.types import Sigmas, TimestepSpacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["ALIASES", "Choice", "Name", "missing_package", "read_name", "reason_against"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A class of diffusers with fixed options.

    Attributes:
        class_name: Class of diffusers.
        options: Options of its `__init__` that the name fixes.
    """

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Name:
    """A name, split into its parts.

    Attributes:
        scheduler: A key of `ALIASES`.
        sigmas: The noise levels that the name includes, or None.
        spacing: The spacing that the name includes, or None.
    """

    scheduler: str
    sigmas: Sigmas | None = None
    spacing: TimestepSpacing | None = None


def _dpm(algorithm: str = "dpmsolver++", *, order: int = 2, solver: str = "midpoint") -> Choice:
    options = {
        "algorithm_type": algorithm,
        "solver_order": order,
        "solver_type": solver,
        "final_sigmas_type": "zero",
    }
    return Choice("DPMSolverMultistepScheduler", options)


ALIASES: Final[Mapping[str, tuple[Choice, ...]]] = {
    "DDIM": (Choice("DDIMScheduler"),),
    "DDPM": (Choice("DDPMScheduler"),),
    "DEIS": (Choice("DEISMultistepScheduler"),),
    "DPM++ 2M": (_dpm(),),
    "DPM++ 2M SDE": (_dpm("sde-dpmsolver++"),),
    "DPM++ 2M SDE Heun": (_dpm("sde-dpmsolver++", solver="heun"),),
    "DPM++ 2S": (
        Choice(
            "DPMSolverSinglestepScheduler",
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
        ),
    ),
    "DPM++ 3M SDE": (_dpm("sde-dpmsolver++", order=3),),
    "DPM++ SDE": (Choice("DPMSolverSDEScheduler"),),
    "DPM2": (Choice("KDPM2DiscreteScheduler"),),
    "DPM2 a": (Choice("KDPM2AncestralDiscreteScheduler"),),
    "Euler": (
        Choice("EulerDiscreteScheduler"),
        Choice("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
    ),
    "Euler a": (
        Choice("EulerAncestralDiscreteScheduler"),
        Choice("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ),
    "Heun": (Choice("HeunDiscreteScheduler"), Choice("FlowMatchHeunDiscreteScheduler")),
    "LCM": (Choice("LCMScheduler"), Choice("FlowMatchLCMScheduler")),
    "LMS": (Choice("LMSDiscreteScheduler"),),
    "PLMS": (Choice("PNDMScheduler", {"skip_prk_steps": True}),),
    "SA-Solver": (Choice("SASolverScheduler"),),
    "TCD": (Choice("TCDScheduler"),),
    "UniPC": (Choice("UniPCMultistepScheduler"),),
}
"""For each name, its meanings; a model supports at most one of them. The pixels differ from those of other programs,
which implement the methods differently."""

_SAME = {
    # Diffusers has no ancestral form; its documentation names this one as the most similar.
    "dpm++2sa": "dpm++2s",
    "dpm++3m": "dpm++3msde",
    "dpmsolver++": "dpm++2m",
    "pndm": "plms",
    "unipcbh2": "unipc",
}

_NOT_IN_DIFFUSERS = (
    "DPM fast",
    "DPM adaptive",
    "Restart",
    "HeunPP2",
    "er_sde",
    "gradient_estimation",
    "res_multistep",
    "res_multistep_ancestral",
)

_PACKAGES = {
    "DPM++ SDE": "torchsde",
    "DPMSolverSDEScheduler": "torchsde",
    "LMS": "scipy",
    "LMSDiscreteScheduler": "scipy",
    Sigmas.BETA: "scipy",
}

_SUFFIXES: tuple[tuple[str, Sigmas | None, TimestepSpacing | None], ...] = (
    ("karras", Sigmas.KARRAS, None),
    ("exponential", Sigmas.EXPONENTIAL, None),
    ("beta", Sigmas.BETA, None),
    ("sgmuniform", None, TimestepSpacing.TRAILING),
    # InvokeAI's euler_k.
    ("k", Sigmas.KARRAS, None),
)


def read_name(name: str) -> Name | None:
    """Returns the parts of a familiar name in any known spelling, or None if it is unknown.

    For example, "DPM++ 2M Karras", "dpmpp_2m_karras" and "dpmpp_2m_k" are the same.
    """
    key = _key(name)
    if (found := _BY_KEY.get(key)) is not None:
        return Name(found)
    for suffix, sigmas, spacing in _SUFFIXES:
        if key.endswith(suffix) and (found := _BY_KEY.get(_key(key.removesuffix(suffix)))) is not None:
            return Name(found, sigmas, spacing)
    return None


def reason_against(name: str) -> str | None:
    """Returns why a name from another program is unavailable with every model; None if there is no such reason."""
    known = {_key(each): each for each in _NOT_IN_DIFFUSERS}.get(_key(name))
    return None if known is None else f"{known} does not exist in diffusers"


def missing_package(*needs: str | Sigmas | None) -> str | None:
    """Returns the package that one of these choices needs and that is not installed, or None.

    Args:
        needs: Keys of `ALIASES`, names of classes, or noise levels.
    """
    packages = (_PACKAGES.get(each) for each in needs if each is not None)
    return next((each for each in packages if each is not None and importlib.util.find_spec(each) is None), None)


def _key(name: str) -> str:
    """Returns a name without the differences between the programs."""
    key = re.sub(r"[\s_-]+", "", name.casefold()).replace("dpmpp", "dpm++").removesuffix("gpu")
    key = re.sub(r"^k(?=dpm|euler|heun|lms)", "", key)
    key = re.sub(r"ancestral(?=$|karras|exponential|beta)", "a", key)
    return _SAME.get(key, key)


def _keys(names: Iterable[str]) -> dict[str, str]:
    return {_key(name): name for name in names}


_BY_KEY = _keys(ALIASES)
