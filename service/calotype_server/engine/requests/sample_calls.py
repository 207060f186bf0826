"""Arguments of realistic denoiser calls, captured from the pipeline's own code, to measure and to compare with."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.capabilities import denoiser_name, read_guidance
from calotype_server.engine.memory import is_device_failure
from calotype_server.engine.requests.arguments import size_arguments
from calotype_server.engine.requests.denoiser_proxy import DenoiserProxy
from calotype_server.engine.requests.read_only import ChangeRejected
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import ModelInfo

__all__ = [
    "Arguments",
    "default_arguments",
    "denoiser_call",
    "plain_arguments",
    "rejected_change",
    "sample_calls",
]

_log = structlog.get_logger(__name__)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


def plain_arguments(pipeline: Any, width: int, height: int, guidance_scale: float | None) -> dict[str, Any]:
    """Returns arguments for a pipeline call with an empty prompt, without the number of steps."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    call: dict[str, Any] = {"prompt": "", **size_arguments(pipeline, width, height)}
    call |= read_guidance(pipeline).arguments(guidance_scale)
    if "generator" in parameters:
        call["generator"] = torch.Generator().manual_seed(0)
    return call


def sample_calls(pipeline: Any, model: ModelInfo) -> list[Arguments]:
    """Returns the arguments of three denoiser calls of different requests; the first is that of a default request.

    They differ in latents, and in timestep or prompt. The first and the last have the same prompt, so that they can be
    joined even if the pipeline cannot join prompts of different lengths.
    """
    return [
        default_arguments(pipeline, model),
        _captured_call(pipeline, model, number=2, prompt="A red apple.", seed=1),
        _captured_call(pipeline, model, number=3, prompt="", seed=2),
    ]


def default_arguments(pipeline: Any, model: ModelInfo) -> Arguments:
    """Returns the arguments of the first denoiser call of a default request."""
    return _captured_call(pipeline, model, number=1, prompt="", seed=0)


def denoiser_call(pipeline: Any, model: ModelInfo) -> Callable[[], Any]:
    """Returns a function that calls the denoiser once, exactly as the first step of a default request does."""
    module = getattr(pipeline, denoiser_name(pipeline))
    args, kwargs = default_arguments(pipeline, model)

    @torch.no_grad()
    def call() -> Any:
        return module(*args, **kwargs)

    return call


def rejected_change(pipeline: Any, model: ModelInfo) -> str | None:
    """Returns why requests must not share the denoiser, in one sentence, if their pipeline changes it before a call.

    It encodes a prompt, but does not call the denoiser. None also if the pipeline fails: the warm-up reports why.

    Raises:
        Exception: The device failed.
    """

    def capture(*_: Any, **__: Any) -> Any:
        raise _Captured

    name = denoiser_name(pipeline)
    proxies = {name: DenoiserProxy(getattr(pipeline, name), capture)}
    view = request_view(pipeline, make_scheduler(pipeline, model.scheduler), **proxies)
    arguments = plain_arguments(pipeline, model.width, model.height, model.guidance_scale)
    try:
        view(**arguments, num_inference_steps=model.step_count)
    except _Captured:
        pass
    except ChangeRejected as error:
        return error.reason
    except Exception as error:
        if is_device_failure(error):
            raise
        _log.debug("the pipeline failed before it called the denoiser", exc_info=error)
    return None


def _captured_call(pipeline: Any, model: ModelInfo, *, number: int, prompt: str, seed: int) -> Arguments:
    """Returns the arguments of a request's call of that number, from 1, or of its last call if it makes fewer."""
    name = denoiser_name(pipeline)
    module = getattr(pipeline, name)
    captured: list[Arguments] = []

    def capture(*args: Any, **kwargs: Any) -> Any:
        captured.append((args, kwargs))
        if len(captured) == number:
            raise _Captured
        return module(*args, **kwargs)

    proxies = {name: DenoiserProxy(module, capture, ignore_changes=True)}
    view = request_view(pipeline, make_scheduler(pipeline, model.scheduler), **proxies)
    arguments = plain_arguments(pipeline, model.width, model.height, model.guidance_scale) | {"prompt": prompt}
    if "generator" in arguments:
        arguments["generator"].manual_seed(seed)
    with contextlib.suppress(_Captured):
        view(**arguments, num_inference_steps=model.step_count)
    return captured[-1]


class _Captured(BaseException):
    """Ends a pipeline call once its arguments are captured."""
