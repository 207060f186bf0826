"""Timing measurements at load: how many rows are worth computing together, and with how many CPU threads.

An unknown model is batched only up to the size at which its measured throughput still rises.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
import torch

from calotype_server.engine.machine import device_of
from calotype_server.engine.memory import is_device_failure
from calotype_server.engine.requests.sample_calls import default_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from calotype_server.engine.requests.sample_calls import Arguments
    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.engine.runtime.collate import Call
    from calotype_server.types import ModelInfo

__all__ = ["Knee", "Threads", "knee", "pick_threads"]

_log = structlog.get_logger(__name__)

_LEAST_GAIN = 1.05
"""In throughput. A smaller gain is not worth the longer wait of requests that join or leave while a batch runs."""
_MAX_REQUESTS = 16
_REPEATS = 5
_MAX_REPEAT_SECONDS = 0.2
"""For all repeats of one call: the start of the server waits for them."""
_LONG_CALL_SECONDS = 0.5
"""A denoiser this slow has enough work for every core; trying fewer threads would only delay the start."""


@dataclass(frozen=True, slots=True)
class Threads:
    """CPU threads to compute a call with. Spreading the work over many threads pays off only from some rows on.

    Attributes:
        few: For calls of fewer rows than `from_rows`.
        many: For all other calls.
        from_rows: Number of rows from which `many` is faster; infinite if `few` is always faster.
    """

    few: int
    many: int
    from_rows: float

    def of(self, rows: int) -> int:
        """Returns the number of threads for a call of `rows` rows."""
        return self.many if rows >= self.from_rows else self.few


class Knee(NamedTuple):
    """The number of rows beyond which throughput hardly rises, and the threads to compute them with."""

    rows: int
    threads: Threads


@torch.no_grad()
def pick_threads(pipeline: Any, model: ModelInfo, runtime: DenoiserRuntime) -> int:
    """Returns how many CPU threads make one call of the denoiser fastest: torch's default number, or one.

    A small model spends more time on distributing work to threads than they save. Torch's setting stays as it was.

    Args:
        pipeline: The loaded pipeline; not changed.
        model: Its description.
        runtime: Computes the denoiser.
    """
    default = torch.get_num_threads()
    if model.device != "cpu" or default == 1:
        return default
    try:
        bound = runtime.collator.bind(*default_arguments(pipeline, model), {})

        def call() -> Any:
            return runtime.run([bound], bound.rows)

        call()
    except Exception:
        _log.exception("the denoiser cannot be measured")
        return default
    seconds = _fastest(call)
    if seconds > _LONG_CALL_SECONDS:
        return default
    torch.set_num_threads(1)
    try:
        call()
        return 1 if _fastest(call) < seconds else default
    finally:
        torch.set_num_threads(default)


@torch.no_grad()
def knee(
    runtime: DenoiserRuntime,
    call: Arguments,
    *,
    threads: tuple[int, int],
    max_requests: int = _MAX_REQUESTS,
) -> Knee:
    """Finds out how many rows at once pay off, and from how many rows more threads do.

    It times a call joined with itself, for 1, 2, 4, ... requests, until a doubling is slower than the one before, takes
    long without a gain, or memory runs out. The result is the smallest number of requests whose throughput is close to
    the best: more would only make every request wait for the others.

    Args:
        runtime: Computes the denoiser.
        call: Positional and keyword arguments of a real call.
        threads: Number of threads that is fastest for one request, and number of threads available.
        max_requests: Largest number of requests at once; at most 16 are tried.
    """
    bound = runtime.collator.bind(*call, {})
    few, many = threads
    using, from_rows = few, math.inf
    throughput: dict[int, float] = {}
    before = torch.get_num_threads()
    try:
        for count in _doublings(min(max_requests, _MAX_REQUESTS)):
            rows = bound.rows * count
            try:
                seconds = _seconds(using, runtime, [bound] * count)
                if using < many and count > 1:
                    with_many = _seconds(many, runtime, [bound] * count)
                    if with_many * _LEAST_GAIN < seconds:
                        # More rows will not make fewer threads faster.
                        using, from_rows, seconds = many, rows, with_many
            except (MemoryError, RuntimeError) as error:
                # Other errors of a large call may be a limit of the model. A device that failed fails every call.
                if count == 1 or is_device_failure(error):
                    raise
                break
            best = max(throughput.values(), default=0.0)
            throughput[count] = count / seconds
            gain = throughput[count] / best if best else math.inf
            if gain * _LEAST_GAIN < 1 or (gain < _LEAST_GAIN and seconds > _LONG_CALL_SECONDS):
                break
    finally:
        torch.set_num_threads(before)
    # In the format that `make sizing` reads.
    table = ",".join(f"{count * bound.rows}:{1e3 * count / each:.3g}" for count, each in throughput.items())
    _log.info("knee", step_ms=table)
    enough = max(throughput.values()) / _LEAST_GAIN
    count = next(count for count, each in throughput.items() if each >= enough)
    return Knee(count * bound.rows, Threads(few, many, from_rows))


def _doublings(most: int) -> Iterator[int]:
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def _fastest(call: Callable[[], Any]) -> float:
    """Shortest of a few calls in seconds: other work on the machine can only make a call longer."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _seconds(threads: int, runtime: DenoiserRuntime, calls: Sequence[Call]) -> float:
    """Shortest of a few calls after one to warm up; fewer calls if they take long."""
    torch.set_num_threads(threads)
    device, rows = device_of(runtime.module), sum(call.rows for call in calls)
    best, spent = math.inf, 0.0
    runtime.run(calls, rows)
    for _ in range(_REPEATS):
        _synchronize(device)
        started = time.perf_counter()
        runtime.run(calls, rows)
        _synchronize(device)
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
        if best > _LONG_CALL_SECONDS or spent > _MAX_REPEAT_SECONDS:
            break
    return best


def _synchronize(device: torch.device) -> None:
    """Waits for the model's device, which need not be torch's current one."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
