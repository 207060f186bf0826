"""Tries a loaded pipeline once, so that a model that cannot draw from a prompt alone is reported with its own reason.

Some pipelines accept a prompt and a size, but only check in their call whether they also got an image. Others use a
package without checking that it is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.capabilities.sizes import native_size, size_multiple
from calotype_server.engine.loading.checks.packages import needs_packages, package_missing_in
from calotype_server.engine.loading.explain import causes, first_line
from calotype_server.engine.memory import is_device_failure, is_out_of_memory
from calotype_server.engine.requests.sample_calls import plain_arguments
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_draws"]

_log = structlog.get_logger(__name__)

_EDGE = 256
"""Longer edge of the image in pixels: a step costs little, even of a large model on a CPU."""


def check_draws(model: str, pipeline: Any) -> None:
    """Draws one small image with as few steps as the pipeline takes.

    Args:
        model: The operator's setting, for the message.
        pipeline: The loaded pipeline; not changed.

    Raises:
        ModelUnavailable: The pipeline cannot draw. The message has its own reason.
        Exception: The device failed or its memory is exhausted.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    multiple = size_multiple(pipeline, denoiser)
    native = native_size(pipeline, denoiser, multiple)
    small = tuple(min(edge, max(multiple, _EDGE // multiple * multiple)) for edge in native)
    failure: Exception | None = None
    for width, height in dict.fromkeys([small, native]):
        failure = _failure(pipeline, width, height)
        if failure is None:
            return
        if is_device_failure(failure) or is_out_of_memory(failure):
            raise failure
    assert failure is not None
    _log.debug("the pipeline cannot draw", model=model, exc_info=failure)
    kind = type(pipeline).__name__
    package = package_missing_in(causes(failure))
    if package is not None:
        raise ModelUnavailable(needs_packages(f"{model!r} is a {kind}, which", [package])) from failure
    raise ModelUnavailable(
        f"{model!r} is a {kind}, which cannot draw an image from a prompt alone: {first_line(failure)}"
    ) from failure


def _failure(pipeline: Any, width: int, height: int) -> Exception | None:
    """Returns the pipeline's reason not to draw an image of that size, or None if it does."""
    name = type(pipeline.scheduler).__name__
    reasons: list[Exception] = []
    for steps in _step_counts(pipeline.scheduler):
        view = request_view(pipeline, make_scheduler(pipeline, name))
        arguments = plain_arguments(pipeline, width, height, None)
        try:
            with torch.no_grad():
                view(**arguments, num_inference_steps=steps, output_type="pt")
        except ValueError as error:
            # The number of steps may be the reason.
            reasons.append(error)
        except Exception as error:
            return error
        else:
            return None
    return reasons[-1]


def _step_counts(scheduler: Any) -> Iterator[int]:
    """Yields numbers of steps. Second-order schedulers need two, and some distilled models require two or four."""
    if getattr(scheduler, "order", 1) == 1:
        yield 1
    yield from (2, 4)
