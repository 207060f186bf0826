"""What is measured of a model at load: its denoiser, called as a request would call it."""

from __future__ import annotations

import contextlib
import inspect
import time
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.view import make_scheduler, request_view

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import ModelInfo

_log = structlog.get_logger(__name__)

__all__ = ["Proxy", "denoiser_call", "pick_threads", "plain_arguments"]

_REPEATS = 5
_LONG_CALL_SECONDS = 0.5
"""A denoiser this slow has enough work for every core; trying fewer would only make the start slower."""


class Proxy:
    """Stands in for a module in a view: answers calls itself, and has the module's attributes otherwise.

    Args:
        module: The real one.
        answer: Called in its place.
    """

    def __init__(self, module: Any, answer: Callable[..., Any]) -> None:
        self._module = module
        self._answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Asks `answer`."""
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


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


def denoiser_call(pipeline: Any, model: ModelInfo) -> Callable[[], Any]:
    """Returns a function that calls the denoiser once, as the first step of a default request does."""
    name = denoiser_name(pipeline)
    module = getattr(pipeline, name)
    captured: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def capture(*args: Any, **kwargs: Any) -> Any:
        captured.append((args, kwargs))
        raise _Captured

    view = request_view(pipeline, make_scheduler(pipeline, model.scheduler), **{name: Proxy(module, capture)})
    with contextlib.suppress(_Captured):
        view(
            **plain_arguments(pipeline, model.width, model.height, model.guidance_scale),
            num_inference_steps=model.step_count,
        )
    args, kwargs = captured[0]

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
