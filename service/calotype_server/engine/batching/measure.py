"""What is found out about a model at load: whether its calls may be joined, and how many at once pay.

Together they make "any pipeline" honest: an unknown model is batched because its own answers were seen to stay the
same, and as far as its own speed was seen to rise.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
import torch

from calotype_server.engine.batching.collate import Call, Collator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Knee", "Threads", "knee", "unbatchable", "verify"]

_log = structlog.get_logger(__name__)

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_TF32_TOLERANCE = 2e-3
"""For float32 on CUDA, where convolutions round to ten bits unless told otherwise."""
_LEAST_GAIN = 1.05
"""Of throughput: less is not worth the longer wait for whoever comes or leaves while a batch runs."""
_MOST_REQUESTS = 16
_REPEATS = 5
_ENOUGH_SECONDS = 0.2
"""Of repeats: whoever starts the server waits for them."""
_LONG_CALL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Threads:
    """Threads of the CPU that a call is computed with: it takes many rows to be worth handing them out.

    Attributes:
        few: For calls of fewer rows than `from_rows`.
        many: For the others.
        from_rows: How many rows that takes; infinite where few are always quicker.
    """

    few: int
    many: int
    from_rows: float

    def of(self, rows: int) -> int:
        """Returns the number for a call of so many rows."""
        return self.many if rows >= self.from_rows else self.few


class Knee(NamedTuple):
    """The most rows at once that pay, and the threads to compute them with."""

    rows: int
    threads: Threads


def unbatchable(module: torch.nn.Module) -> str | None:
    """Says why requests must not even take turns on a module, in a sentence; None when they may.

    Such a module needs the requests one after another, each with the module itself in its view: no proxy.
    """
    if getattr(module, "is_cache_enabled", False):
        return "Its cache keeps results from one step for the next, and all requests would share them."
    if getattr(module, "_parallel_config", None) is not None:
        return "It is spread over several processes, which would have to agree on every batch."
    for part in module.modules():
        if hasattr(part, "_hf_hook"):
            return "Accelerate moves its weights between devices at the start and at the end of a generation."
        registry = getattr(part, "_diffusers_hook", None)
        for name, hook in getattr(registry, "hooks", {}).items():
            if getattr(hook, "_is_stateful", False):
                return f"Its hook {name!r} keeps results from one step for the next, and all requests would share them."
    return None


@torch.no_grad()
def verify(
    module: torch.nn.Module, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], *, deterministic_rows: int = 0
) -> str | None:
    """Compares joined calls with the same calls one by one.

    Args:
        module: The denoiser.
        calls: Positional and keyword arguments of real calls that differ in latents, prompt and timestep. At least two
            of them must be of a kind that can be joined.
        deterministic_rows: Rows of the bucket of a deterministic batcher. If given, an answer must be bitwise the same
            whoever shares the bucket.

    Returns:
        Why the module must not be batched, in a sentence; None when it may. It can still be shared in turns, by a
        `StepBatcher` with one row.
    """
    collator = Collator(module, exact=bool(deterministic_rows))
    bound = [collator.bind(args, kwargs, {}) for args, kwargs in calls]
    mates = max(([each for each in bound if each.signature == call.signature] for call in bound), key=len)
    if len(mates) < 2:
        return "Two of its calls have nothing in common that could be joined."
    try:
        together = _answers(collator, module, mates)
        alone = [_answers(collator, module, [call])[0] for call in mates]
        for joined, single in zip(together, alone, strict=True):
            error, tolerance = _compare(joined, single)
            if not error <= tolerance:
                return (
                    f"Joined calls have answers of their own: they differ by {error:.1e}, and {tolerance:.0e} may be."
                )
        if deterministic_rows and not _is_deterministic(collator, module, mates, deterministic_rows):
            return "An answer's last bits depend on the company in the batch."
    except Exception as error:
        return f"A joined call failed with {type(error).__name__}."
    return None


@torch.no_grad()
def knee(
    module: torch.nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    threads: tuple[int, int],
    most: int = _MOST_REQUESTS,
) -> Knee:
    """Finds out how many rows at once pay, and what it takes to use more threads, by timing a call joined with itself.

    The rows are those of the fewest requests whose throughput comes close to the best: beyond, all would only wait for
    all others. Doublings are tried until one is slower than the one before, takes long without a gain, or memory runs
    out.

    Args:
        module: The denoiser.
        call: Positional and keyword arguments of a real call.
        threads: What is quickest for one request, and how many there are.
        most: Requests that there may be at once; more than sixteen are not tried.
    """
    collator = Collator(module)
    bound = collator.bind(*call, {})
    few, many = threads
    using, from_rows = few, math.inf
    reached: dict[int, float] = {}
    before = torch.get_num_threads()
    try:
        for count in _doublings(min(most, _MOST_REQUESTS)):
            rows = bound.rows * count
            try:
                joined = collator.join([bound] * count, rows)
                seconds = _seconds(using, module, *joined)
                if using < many and count > 1:
                    quicker = _seconds(many, module, *joined)
                    if quicker * _LEAST_GAIN < seconds:
                        # From here on there is no need to try fewer.
                        using, from_rows, seconds = many, rows, quicker
            except (torch.OutOfMemoryError, MemoryError, RuntimeError):
                if count == 1:
                    raise
                break
            best = max(reached.values(), default=0.0)
            reached[count] = count / seconds
            gain = reached[count] / best if best else math.inf
            if gain * _LEAST_GAIN < 1 or (gain < _LEAST_GAIN and seconds > _LONG_CALL_SECONDS):
                break
    finally:
        torch.set_num_threads(before)
    # As `make sizing` takes it.
    table = ",".join(f"{count * bound.rows}:{1e3 * count / throughput:.3g}" for count, throughput in reached.items())
    _log.info("knee", step_ms=table)
    enough = max(reached.values()) / _LEAST_GAIN
    count = next(count for count, throughput in reached.items() if throughput >= enough)
    return Knee(count * bound.rows, Threads(few, many, from_rows))


def _doublings(most: int) -> Iterator[int]:
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def _answers(collator: Collator, module: Any, calls: Sequence[Call], padded_rows: int = 0) -> list[Any]:
    rows = max(padded_rows, sum(call.rows for call in calls))
    args, kwargs = collator.join(calls, rows)
    return collator.split(module(*args, **kwargs), calls, rows)


def _is_deterministic(collator: Collator, module: Any, calls: Sequence[Call], rows: int) -> bool:
    """Whether the first call's answer is the same alone, and behind as many others as there is room for."""
    first, *others = calls
    count = max(0, (rows - first.rows) // max(call.rows for call in others))
    company = [others[number % len(others)] for number in range(count)]
    alone = _answers(collator, module, [first], rows)[0]
    last = _answers(collator, module, [*company, first], rows)[-1]
    return all(torch.equal(a, b) for a, b in zip(_tensors(alone), _tensors(last), strict=True))


def _compare(joined: Any, single: Any) -> tuple[float, float]:
    """Largest error relative to the largest value, and what is allowed."""
    worst, allowed = 0.0, math.inf
    for a, b in zip(_tensors(joined), _tensors(single), strict=True):
        if a.shape != b.shape:
            return math.inf, 0.0
        allowed = min(allowed, _tolerance(b))
        scale = b.abs().max().double().clamp_min(torch.finfo(torch.float32).tiny)
        error = float((a.double() - b.double()).abs().max() / scale)
        worst = max(worst, error) if not math.isnan(error) else math.nan
        if math.isnan(worst):
            break
    return worst, allowed


def _tolerance(answer: torch.Tensor) -> float:
    if answer.dtype == torch.float32 and answer.is_cuda:
        return _TF32_TOLERANCE
    return _TOLERANCES.get(answer.dtype, _TOLERANCES[torch.bfloat16])


def _tensors(answer: Any) -> Iterator[torch.Tensor]:
    if isinstance(answer, torch.Tensor):
        yield answer
    elif isinstance(answer, dict):
        yield from _tensors(list(answer.values()))
    elif isinstance(answer, (list, tuple)):
        for part in answer:
            yield from _tensors(part)


def _seconds(threads: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Shortest of a few after one to warm up; of fewer where that takes long."""
    torch.set_num_threads(threads)
    best, spent = math.inf, 0.0
    module(*args, **kwargs)
    for _ in range(_REPEATS):
        _synchronize()
        begun = time.perf_counter()
        module(*args, **kwargs)
        _synchronize()
        seconds = time.perf_counter() - begun
        best, spent = min(best, seconds), spent + seconds
        if best > _LONG_CALL_SECONDS or spent > _ENOUGH_SECONDS:
            break
    return best


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
