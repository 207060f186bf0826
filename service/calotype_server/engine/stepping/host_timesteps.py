"""Lets a scheduler step without waiting for the device.

A pipeline passes `scheduler.step` a timestep on the device. Many schedulers look it up in tables in ordinary memory,
and each lookup waits until the device has computed everything before it: six times per step with DDIM, thirteen times
with DDPM. The values are known since `set_timesteps`, so these schedulers get them from a copy in ordinary memory.

Images stay bit-identical. The numbers in the tables are the same, but a GPU rounds differently for a factor in ordinary
memory than for one in its own. So a factor of the latents must stay where it is, which decides which schedulers are in
`HOSTED`. LCM is the exception: its boundary conditions are factors, and they are still computed on the device.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HOSTED", "keep_timesteps_on_host"]

HOSTED = frozenset(
    {
        "CogVideoXDDIMScheduler",
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
        "UniPCMultistepScheduler",
    }
)
"""Classes of schedulers whose timesteps only select entries of tables. A test checks each of them."""

_LOOK_UP_EVERY_STEP = frozenset(
    {
        "CogVideoXDDIMScheduler",
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "FlowMapEulerDiscreteScheduler",
        "LCMScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
    }
)
"""The others look up only their first timestep, and not even that if the pipeline has called `set_begin_index`."""


def keep_timesteps_on_host(scheduler: Any) -> None:
    """Makes a scheduler use timesteps in ordinary memory. Does nothing if its class is not in `HOSTED`.

    The pipeline keeps the timesteps on the device, which it passes to the denoiser. When it uses the first of them, the
    scheduler's attribute `timesteps` becomes a copy in ordinary memory; this waits for the device once.

    Args:
        scheduler: A scheduler that only this request uses. A `StepTap` that wraps it before also gets host timesteps.
    """
    if type(scheduler).__name__ in HOSTED:
        _HostTimesteps(scheduler)


class _HostTimesteps:
    """Wraps `set_timesteps`, `scale_model_input` and `step` of a scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._given: torch.Tensor | None = None
        """The timesteps on the device, which are kept so that their memory cannot be used for other tensors."""
        self._host: torch.Tensor | None = None
        self._current: tuple[Any, Any] = (None, None)
        """The timestep of this step on the device, and its copy on the host."""
        set_timesteps = scheduler.set_timesteps

        # `wraps` keeps the signatures: pipelines check them for `sigmas`, `eta` or `generator`.
        @functools.wraps(set_timesteps)
        def hosted_set_timesteps(*args: Any, **kwargs: Any) -> None:
            self._given = self._host = None
            set_timesteps(*args, **kwargs)

        scheduler.set_timesteps = hosted_set_timesteps
        for name in ("step", "scale_model_input"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, self._hosted(getattr(scheduler, name)))
        if hasattr(scheduler, "get_scalings_for_boundary_condition_discrete"):
            # LCM multiplies latents by these.
            scalings = scheduler.get_scalings_for_boundary_condition_discrete
            scheduler.get_scalings_for_boundary_condition_discrete = lambda timestep: scalings(
                self._on_device(timestep)
            )

    def _hosted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a method whose second argument is a timestep."""

        @functools.wraps(function)
        def hosted(*args: Any, **kwargs: Any) -> Any:
            if len(args) > 1:
                args = (args[0], self._on_host(args[1]), *args[2:])
            elif "timestep" in kwargs:
                kwargs["timestep"] = self._on_host(kwargs["timestep"])
            return function(*args, **kwargs)

        return hosted

    def _on_host(self, timestep: Any) -> Any:
        """Returns the host's copy of a timestep, or the timestep itself if it is not an entry of the scheduler's."""
        if not isinstance(timestep, torch.Tensor) or timestep.device.type == "cpu":
            return timestep
        given = self._scheduler.timesteps if self._given is None else self._given
        index = _index(given, timestep)
        if index is None:
            return timestep
        if self._host is None:
            scheduler = self._scheduler
            looks_up = type(scheduler).__name__ in _LOOK_UP_EVERY_STEP
            if not looks_up and getattr(scheduler, "begin_index", None) is not None:
                return timestep
            self._given, self._host = given, given.cpu()
            self._scheduler.timesteps = self._host
        self._current = timestep, self._host[index]
        return self._current[1]

    def _on_device(self, timestep: Any) -> Any:
        """Returns the timestep that the pipeline passed for a host's copy."""
        given, host = self._current
        return given if timestep is host else timestep


def _index(timesteps: torch.Tensor, timestep: torch.Tensor) -> int | None:
    """Returns which entry of `timesteps` a tensor is, by its address, because reading its value would wait."""
    if timestep.ndim or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if not timesteps.is_contiguous():
        return None
    index, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return index if not rest and 0 <= index < len(timesteps) else None
