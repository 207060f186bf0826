"""Correctness check at load: do two requests, whose steps alternate, get the images that each gets alone?

Schedulers, guiders and the like belong to a request's view, see `requests.own_state`. This check finds everything else
that keeps state from one step to the next, such as a module that remembers its last answer.
"""

from __future__ import annotations

import queue
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server import threads
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.machine import select_device
from calotype_server.engine.memory import is_device_failure
from calotype_server.engine.requests.denoiser_proxy import DenoiserProxy
from calotype_server.engine.requests.read_only import ChangeRejected
from calotype_server.engine.requests.sample_calls import plain_arguments
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.runtime.compare import compare
from calotype_server.engine.schedulers.make import make_scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.engine.requests.sample_calls import Arguments
    from calotype_server.types import ModelInfo

__all__ = ["shared_state"]

_log = structlog.get_logger(__name__)

_MAX_STEPS = 8
"""Enough for state without effect in the first steps: HunyuanImage's guider uses its momentum from the seventh on."""

_SHRINK = 4
"""The images of the check have this fraction of the default edges. State does not depend on the size, but time does."""

_PROMPTS = ("", "A red apple.")

_ALLOWED = 1e-5
"""Relative difference from rounding, where the same call need not give the same bits."""
_ALLOWED_NOISE = 4.0
"""Factor on the difference between two equal runs, for devices that do not repeat results."""


def shared_state(pipeline: Any, model: ModelInfo) -> str | None:
    """Returns why requests must not even take turns on a pipeline, in one sentence, or None if they may.

    It generates two small images of up to 8 steps, first one after the other and then in turns.

    Args:
        pipeline: The loaded pipeline; not changed.
        model: Its description.

    Raises:
        Exception: The pipeline failed.
    """
    multiple = model.size_multiple
    width, height = (max(multiple, edge // _SHRINK // multiple * multiple) for edge in (model.width, model.height))
    try:
        return _compared(pipeline, replace(model, width=width, height=height))
    except Exception as error:
        if is_device_failure(error):
            raise
        _log.debug("the model draws no small images", exc_info=error)
        return _compared(pipeline, model)


@torch.no_grad()
def _compared(pipeline: Any, model: ModelInfo) -> str | None:
    try:
        alone = [_latents(pipeline, model, [number])[0] for number in range(2)]
        together = _latents(pipeline, model, [0, 1])
    except ChangeRejected as error:
        return error.reason
    for number in range(2):
        if torch.equal(torch.nan_to_num(alone[number]), torch.nan_to_num(together[number])):
            continue
        noise, _ = compare(_latents(pipeline, model, [number])[0], alone[number])
        difference, _ = compare(together[number], alone[number])
        if not difference <= max(_ALLOWED, _ALLOWED_NOISE * noise):
            return f"It keeps state between steps: requests in turns change each other's images ({difference:.0e})."
    return None


def _latents(pipeline: Any, model: ModelInfo, numbers: Sequence[int]) -> list[torch.Tensor]:
    """Returns the latents of requests whose calls of the denoiser alternate, in the order of their numbers."""
    module = getattr(pipeline, denoiser_name(pipeline))
    runs = [_Run(pipeline, model, number) for number in numbers]
    try:
        calls = [run.start() for run in runs]
        while any(calls):
            for index, call in enumerate(calls):
                if call is not None:
                    args, kwargs = call
                    calls[index] = runs[index].proceed(module(*args, **kwargs))
    finally:
        for run in runs:
            run.stop()
    return [run.latents for run in runs]


class _Stopped(BaseException):
    """Ends a run whose answers are no longer computed."""


class _Run:
    """A request in a thread of its own, which only runs while `start` or `proceed` waits for it.

    Args:
        pipeline: The loaded pipeline; not changed.
        model: Its description, with the size to generate.
        number: 0 or 1: decides the prompt, the seed and whether guidance is used.
    """

    def __init__(self, pipeline: Any, model: ModelInfo, number: int) -> None:
        name = denoiser_name(pipeline)
        proxies = {name: DenoiserProxy(getattr(pipeline, name), self._call)}
        self._view = request_view(pipeline, make_scheduler(pipeline, model.scheduler), **proxies)
        guidance = None if model.guidance_scale is None else (model.guidance_scale, 1.0)[number]
        self._arguments = plain_arguments(pipeline, model.width, model.height, guidance) | {
            "prompt": _PROMPTS[number],
            "num_inference_steps": min(model.step_count, _MAX_STEPS),
            "output_type": "latent",
        }
        if "generator" in self._arguments:
            self._arguments["generator"].manual_seed(number)
        self._device = torch.device(model.device)
        self._calls: queue.SimpleQueue[Arguments | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self.latents = torch.empty(0)

    def start(self) -> Arguments | None:
        """Starts the run. Returns the arguments of its first call of the denoiser, or None if it makes none.

        Raises:
            Exception: The pipeline failed.
        """
        threads.start("interleaved", self._run)
        return self._next_call()

    def proceed(self, answer: Any) -> Arguments | None:
        """Continues the run with the answer to its call; returns and raises as `start`."""
        self._answers.put(answer)
        return self._next_call()

    def stop(self) -> None:
        """Ends a run that waits for an answer."""
        self._answers.put(_Stopped())

    def _next_call(self) -> Arguments | None:
        call = self._calls.get()
        if self._error is not None:
            raise self._error
        return call

    def _run(self) -> None:
        try:
            select_device(self._device)
            self.latents = self._view(**self._arguments)[0]
        except _Stopped:
            return
        except BaseException as error:
            self._error = error
        self._calls.put(None)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._calls.put((args, kwargs))
        answer = self._answers.get()
        if isinstance(answer, _Stopped):
            raise answer
        return answer
