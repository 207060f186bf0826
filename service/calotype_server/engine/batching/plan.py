"""The batching plan: how many generations share one denoiser, and how. It is decided when the model is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.batching.interleaved import shared_state
from calotype_server.engine.batching.measure import Knee, Threads, knee, pick_threads
from calotype_server.engine.batching.verify import unbatchable, verify
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.machine import device_of
from calotype_server.engine.memory import is_device_failure
from calotype_server.engine.requests.own_state import uncopyable
from calotype_server.engine.requests.sample_calls import Arguments, rejected_change, sample_calls

if TYPE_CHECKING:
    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.types import ModelInfo

__all__ = [
    "Plan",
    "PlanOptions",
    "deterministic_rows",
    "measure_plan",
    "measures_threads",
    "most_rows",
    "reason_to_run_alone",
]

_log = structlog.get_logger(__name__)

_MAX_ACTIVE_DEFAULT = 8
"""As many as memory allows, which admission watches; with more, those that wait would see no progress for too long."""

_MAX_ACTIVE_WITHOUT_LIMIT = 2
"""On devices whose free memory is unknown, unless calls are joined."""

_DETERMINISTIC_REQUESTS = 4
"""Batches of a deterministic server are filled up to the rows of this many default requests."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The operator's settings that a plan depends on.

    Attributes:
        max_active: Generations that run at once. None: 8, or fewer if the device's free memory is unknown.
        max_rows: Most rows to compute together. None: as many as pay off.
        threads: CPU threads. None: measured, or torch's default if `deterministic`.
        deterministic: Whether an image must be bitwise the same regardless of other requests. Then nothing depends on a
            timing measurement, so that the next start produces the same image too.
    """

    max_active: int | None = 1
    max_rows: int | None = None
    threads: int | None = None
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A way for generations to share the denoiser.

    Attributes:
        max_active: Generations that run at once.
        max_rows: Rows that the denoiser computes together; 1 if generations take turns or only one runs at a time; 0 if
            that one's pipeline must call the denoiser itself.
        reason: Why calls are not joined, in one sentence; empty if they are.
        threads: CPU threads to compute calls of the denoiser with.
        provisional: Whether an error, such as exhausted memory, decided it. The next start should try again.
        request_rows: Rows of a default request.
    """

    max_active: int
    max_rows: int
    reason: str
    threads: Threads
    provisional: bool = False
    request_rows: int = 1

    @property
    def max_joined(self) -> int:
        """Default requests that the denoiser computes together."""
        return max(1, self.max_rows // self.request_rows)


def reason_to_run_alone(pipeline: Any, options: PlanOptions) -> str | None:
    """Returns why generations run one at a time, in one sentence, if that is known without measuring."""
    if options.max_active == 1:
        return "The server was started with --max-active 1."
    return _must_call_itself(pipeline)


def measures_threads(model: ModelInfo, options: PlanOptions) -> bool:
    """Whether `measure_plan` has to measure how many threads are fastest for one request."""
    return not options.threads and not options.deterministic and model.device == "cpu" and torch.get_num_threads() > 1


def measure_plan(pipeline: Any, model: ModelInfo, options: PlanOptions, runtime: DenoiserRuntime) -> Plan:
    """Measures the denoiser and decides. Torch's number of threads stays as it was.

    Args:
        pipeline: The loaded pipeline; not changed.
        model: Its description.
        options: The operator's settings.
        runtime: Computes the denoiser.

    Raises:
        RuntimeError: The device failed; see `is_device_failure`.
    """
    before = torch.get_num_threads()
    most = options.threads or before
    few = pick_threads(pipeline, model, runtime) if measures_threads(model, options) else most
    reason = reason_to_run_alone(pipeline, options)
    try:
        if reason is not None:
            calls_itself = _must_call_itself(pipeline) or rejected_change(pipeline, model)
            return Plan(1, 0 if calls_itself else 1, reason, Threads(few, most, math.inf))
        torch.set_num_threads(few)
        state = shared_state(pipeline, model)
        if state is not None:
            return Plan(1, 0, state, Threads(few, most, math.inf))
        return _batching_plan(runtime, sample_calls(pipeline, model), options, (few, most))
    except Exception as error:
        if is_device_failure(error):
            raise
        _log.exception("the denoiser cannot be measured")
        reason = "The denoiser could not be measured."
        return Plan(1, 0, reason, Threads(few, most, math.inf), provisional=True)
    finally:
        torch.set_num_threads(before)


def _must_call_itself(pipeline: Any) -> str | None:
    """Returns why one request runs at a time and calls the denoiser itself, if that is known without a call."""
    return unbatchable(getattr(pipeline, denoiser_name(pipeline))) or uncopyable(pipeline)


def deterministic_rows(options: PlanOptions, rows: int) -> int:
    """Returns the rows that every batch is filled up to if `deterministic`, or else 0.

    Args:
        options: The operator's settings.
        rows: Rows of a default request.
    """
    return (options.max_rows or _DETERMINISTIC_REQUESTS * rows) if options.deterministic else 0


def most_rows(options: PlanOptions, rows: int) -> int:
    """Returns the most rows that a plan may compute together.

    Args:
        options: The operator's settings.
        rows: Rows of a default request.
    """
    if options.deterministic:
        return deterministic_rows(options, rows)
    return options.max_rows or rows * (options.max_active or _MAX_ACTIVE_DEFAULT)


def _batching_plan(
    runtime: DenoiserRuntime, calls: list[Arguments], options: PlanOptions, threads: tuple[int, int]
) -> Plan:
    rows = runtime.collator.bind(*calls[0], {}).rows
    if options.deterministic:
        found = Knee(deterministic_rows(options, rows), Threads(threads[1], threads[1], math.inf))
    else:
        found = knee(runtime, calls[0], threads=threads, max_requests=options.max_active or _MAX_ACTIVE_DEFAULT)
    max_rows = options.max_rows or found.rows
    # The last bits of an answer depend on the number of threads.
    torch.set_num_threads(found.threads.of(max_rows))
    reason, failed = _verified(runtime, calls, max_rows if options.deterministic else 0)
    if reason is not None:
        max_active = options.max_active or _turn_takers(device_of(runtime.module))
        return Plan(max_active, 1, reason, found.threads, provisional=failed, request_rows=rows)
    return Plan(options.max_active or _MAX_ACTIVE_DEFAULT, max_rows, "", found.threads, request_rows=rows)


def _turn_takers(device: torch.device) -> int:
    """Returns how many generations may take turns. More of them get no more steps, but their first ones sooner."""
    return _MAX_ACTIVE_DEFAULT if device.type in ("cpu", "cuda") else _MAX_ACTIVE_WITHOUT_LIMIT


def _verified(runtime: DenoiserRuntime, calls: list[Arguments], fixed_rows: int) -> tuple[str | None, bool]:
    """Returns why calls must not be joined, if so, and whether an error is the reason."""
    try:
        return verify(runtime, calls, deterministic_rows=fixed_rows), False
    except Exception as error:
        if is_device_failure(error):
            raise
        return f"A joined call failed with {type(error).__name__}.", True
