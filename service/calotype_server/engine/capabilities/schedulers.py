"""Finds the schedulers that a pipeline can use, their options and their limits."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from calotype_server.engine.schedulers.flow import FLOW_SCHEDULERS, flow_sigmas, is_flow
from calotype_server.engine.schedulers.make import chosen, make_scheduler, works
from calotype_server.engine.schedulers.names import ALIASES
from calotype_server.engine.schedulers.options import sigmas_of, spacings_of
from calotype_server.engine.schedulers.perfect_model import ends_at_x0
from calotype_server.engine.schedulers.predicted_x0 import noise_level
from calotype_server.types import SchedulerInfo, Sigmas

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["compatible_schedulers", "max_step_counts", "prediction_kind", "scheduler_details"]

_STEP_LIMITS = ("num_train_timesteps", "original_inference_steps")

_ALSO_COMPATIBLE = ("LCMScheduler", "SASolverScheduler", "TCDScheduler")
"""Schedulers that work with the same models as those that diffusers lists as compatible with each other."""


def compatible_schedulers(pipeline: Any) -> tuple[str, ...]:
    """Returns the schedulers that expect the same kind of prediction as the model's own, and are right with its config.

    The list of diffusers is too long: some need a package that is not installed, some expect another prediction, some
    do not end at x0. For flow models it is empty or wrong.
    """
    own = type(pipeline.scheduler).__name__
    if is_flow(pipeline.scheduler):
        return tuple(sorted({own, *FLOW_SCHEDULERS}))
    kind = prediction_kind(pipeline, own)
    if kind is None:
        return (own,)
    names = {own}
    compatibles = [each.__name__ for each in getattr(pipeline.scheduler, "compatibles", [])]
    for name in (*compatibles, *_ALSO_COMPATIBLE) if len(compatibles) > 1 else ():
        if name not in names and hasattr(diffusers, name) and _is_right(pipeline, name, kind):
            names.add(name)
    return tuple(sorted(names))


def scheduler_details(pipeline: Any, names: Iterable[str]) -> tuple[SchedulerInfo, ...]:
    """Returns the aliases and options of each of these schedulers, in the same order."""
    own = pipeline.scheduler
    meanings = {alias: chosen(own, alias) for alias in ALIASES}
    details = []
    for name in names:
        kind = getattr(diffusers, name, type(own))
        sigmas, spacings = sigmas_of(kind), spacings_of(kind)
        if is_flow(own):
            sigmas, spacings = flow_sigmas(own), ()
        aliases = [alias for alias, meaning in meanings.items() if meaning.class_name == name and works(own, meaning)]
        if Sigmas.KARRAS in sigmas:
            aliases = [spelling for alias in aliases for spelling in (alias, f"{alias} Karras")]
        details.append(SchedulerInfo(name, tuple(aliases), sigmas, spacings))
    return tuple(details)


def max_step_counts(pipeline: Any, names: Iterable[str]) -> dict[str, int]:
    """Returns the most steps of schedulers that have a limit: the timesteps they were trained on, or fewer."""
    own = copy.deepcopy(pipeline.scheduler)
    found = {}
    for key in _STEP_LIMITS:
        count = own.config.get(key)
        # Some need more arguments than a number of steps, and accept any number.
        with contextlib.suppress(Exception):
            own.set_timesteps(count)
            found[type(own).__name__] = count
            break
    if not found:
        return {}
    for name in set(names) - found.keys():
        accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
        limits = [own.config.get(key, accepted[key].default) for key in _STEP_LIMITS if key in accepted]
        if limits:
            found[name] = min(limits)
    return found


def prediction_kind(pipeline: Any, name: str) -> str | None:
    """Returns the kind of prediction that a scheduler expects, or None if it cannot take a step."""
    try:
        return _kind(make_scheduler(pipeline, name))
    except Exception:  # For any reason: it is not offered.
        return None


def _is_right(pipeline: Any, name: str, kind: str) -> bool:
    """Whether a scheduler expects this kind of prediction, and ends at x0 with a perfect model."""
    try:
        # To make some of them takes 0.3 s.
        scheduler = make_scheduler(pipeline, name)
        return _kind(scheduler) == kind and ends_at_x0(scheduler)
    except Exception:  # For any reason: it is not offered.
        return False


def _kind(scheduler: Any) -> str | None:
    """Returns the kind of prediction that a scheduler expects, or None if a step gives no finite result."""
    scheduler.set_timesteps(4)
    sample = torch.ones(1, 4, 8, 8)
    timestep = scheduler.timesteps[0]
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(sample, timestep)
    level = noise_level(scheduler, 0, timestep)
    stepped = scheduler.step(sample, timestep, sample, return_dict=False)[0]
    return level.kind if level is not None and torch.isfinite(stepped).all() else None
