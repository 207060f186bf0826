"""Checks a runtime with real calls: does it compute what the denoiser computes, and always the same bits?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.runtime.compare import compare, tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.engine.requests.sample_calls import Arguments
    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.engine.runtime.collate import Call

__all__ = ["answers", "difference", "is_deterministic", "joinable"]

_MOST_CALLS = 4
"""Joined calls to compare at most. Further rows take time, and have nothing new."""


def joinable(runtime: DenoiserRuntime, calls: Sequence[Arguments]) -> list[Call]:
    """Returns those of the calls that can be joined: the largest group with the same signature."""
    bound = [runtime.collator.bind(args, kwargs, {}) for args, kwargs in calls]
    return max(([each for each in bound if each.signature == call.signature] for call in bound), key=len)


def answers(runtime: DenoiserRuntime, calls: Sequence[Call], padded_rows: int = 0) -> list[Any]:
    """Returns the answers to calls that are computed together, with at least `padded_rows` rows."""
    rows = max(padded_rows, sum(call.rows for call in calls))
    return runtime.collator.split(runtime.run(calls, rows), calls, rows)


@torch.no_grad()
def difference(runtime: DenoiserRuntime, eager: DenoiserRuntime, calls: Sequence[Arguments]) -> str | None:
    """Compares a runtime with plain calls of the denoiser: each call alone, and several numbers of joined calls.

    Args:
        runtime: The runtime to check.
        eager: Computes the expected answers.
        calls: Positional and keyword arguments of real calls.

    Returns:
        The difference in one sentence, or None if the answers are equal up to rounding.

    Raises:
        Exception: A call failed.
    """
    group = joinable(runtime, calls)
    alone = [[runtime.collator.bind(args, kwargs, {})] for args, kwargs in calls]
    joined = [[group[number % len(group)] for number in range(count)] for count in range(2, _MOST_CALLS + 1)]
    for batch in [*alone, *(joined if len(group) > 1 else [])]:
        for answer, expected in zip(answers(runtime, batch), answers(eager, batch), strict=True):
            error, tolerance = compare(answer, expected)
            if not error <= tolerance:
                return f"Its answers differ from the model's by {error:.1e}; at most {tolerance:.0e} is allowed."
    return None


@torch.no_grad()
def is_deterministic(runtime: DenoiserRuntime, calls: Sequence[Call], rows: int) -> bool:
    """Whether the first call's answer is the same alone, and last in a batch that is full of other calls.

    Args:
        runtime: Computes the calls.
        calls: At least two calls of the same signature.
        rows: Rows that every batch is padded to.
    """
    first, *others = calls
    count = max(0, (rows - first.rows) // max(call.rows for call in others))
    before = [others[number % len(others)] for number in range(count)]
    alone = answers(runtime, [first], rows)[0]
    last = answers(runtime, [*before, first], rows)[-1]
    return all(torch.equal(a, b) for a, b in zip(tensors(alone), tensors(last), strict=True))
