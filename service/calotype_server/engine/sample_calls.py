"""What is seen and measured of a model at load: its denoiser, called as a request would call it."""

from __future__ import annotations

import contextlib
import inspect
import time
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.batching.proxy import DenoiserProxy
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.request_view import make_scheduler, request_view

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import ModelInfo

_log = structlog.get_logger(__name__)

__all__ = ["Arguments", "denoiser_call", "pick_threads", "plain_arguments", "sample_calls"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""

_REPEATS = 5
_LONG_CALL_SECONDS = 0.5
"""A denoiser this slow has enough work for every core; trying fewer would only make the start slower."""


def plain_arguments(pipeline: Any, width: int, height: int, guidance_scale: float | None) -> dict[str, Any]:
    """Returns arguments for a call with an empty prompt, but for the number of steps."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    call: dict[str, Any] = {"prompt": "", "width": width, "height": height}
    if "guidance_scale" in parameters and guidance_scale is not None:
        call["guidance_scale"] = guidance_scale
    if "use_resolution_binning" in parameters:
        # It would draw at the nearest of the real model's sizes, which is larger than asked for, and shrink that.
        call["use_resolution_binning"] = False
    if "generator" in parameters:
        call["generator"] = torch.Generator().manual_seed(0)
    return call


def sample_calls(pipeline: Any, model: ModelInfo) -> list[Arguments]:
    """Returns the arguments of three denoiser calls of different requests, the first as that of a default request.

    They differ in latents, and in timestep or prompt. The first and the last have the same prompt, so that they can be
    joined even where prompts of different length cannot.
    """
    return [
        _captured_call(pipeline, model, number=1, prompt="", seed=0),
        _captured_call(pipeline, model, number=2, prompt="A red apple.", seed=1),
        _captured_call(pipeline, model, number=3, prompt="", seed=2),
    ]


def denoiser_call(pipeline: Any, model: ModelInfo) -> Callable[[], Any]:
    """Returns a function that calls the denoiser once, as the first step of a default request does."""
    module = getattr(pipeline, denoiser_name(pipeline))
    args, kwargs = _captured_call(pipeline, model, number=1, prompt="", seed=0)

    @torch.no_grad()
    def call() -> Any:
        return module(*args, **kwargs)

    return call


def pick_threads(pipeline: Any, model: ModelInfo) -> int:
    """Returns how many threads of the CPU make the denoiser quickest: all that torch would take, or one.

    A small model spends more time on handing work to threads than they save.
    """
    everything = torch.get_num_threads()
    if model.device != "cpu" or everything == 1:
        return everything
    try:
        call = denoiser_call(pipeline, model)
        call()
    except Exception:
        _log.exception("the denoiser cannot be measured")
        return everything
    quickest = _seconds(call)
    if quickest > _LONG_CALL_SECONDS:
        return everything
    torch.set_num_threads(1)
    try:
        call()
        return 1 if _seconds(call) < quickest else everything
    finally:
        torch.set_num_threads(everything)


def _captured_call(pipeline: Any, model: ModelInfo, *, number: int, prompt: str, seed: int) -> Arguments:
    """Arguments of a request's call of that number, from 1, or of its last one if it makes fewer."""
    name = denoiser_name(pipeline)
    module = getattr(pipeline, name)
    captured: list[Arguments] = []

    def capture(*args: Any, **kwargs: Any) -> Any:
        captured.append((args, kwargs))
        if len(captured) == number:
            raise _Captured
        return module(*args, **kwargs)

    proxies = {name: DenoiserProxy(module, capture)}
    view = request_view(pipeline, make_scheduler(pipeline, model.scheduler), **proxies)
    arguments = plain_arguments(pipeline, model.width, model.height, model.guidance_scale) | {"prompt": prompt}
    if "generator" in arguments:
        arguments["generator"].manual_seed(seed)
    with contextlib.suppress(_Captured):
        view(**arguments, num_inference_steps=model.step_count)
    return captured[-1]


class _Captured(BaseException):
    """Ends a pipeline call whose arguments have been seen."""


def _seconds(call: Callable[[], Any]) -> float:
    """Shortest of a few: others on the machine can only make it longer."""
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)
