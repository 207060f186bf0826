"""Correctness checks at load: may requests share the denoiser, and may their calls be joined?

They make "any pipeline" honest: calls of an unknown model are joined only after joined answers were compared with
single ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.runtime.collate import Call, Collator
from calotype_server.engine.runtime.compare import compare, tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["unbatchable", "verify"]


def unbatchable(module: torch.nn.Module) -> str | None:
    """Returns why requests must not even take turns on a module, in one sentence, or None if they may.

    Requests must use such a module one after another, and directly: their views of the pipeline get no proxy.
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
    """Compares the answers to joined calls with the answers to the same calls one by one.

    Args:
        module: The denoiser.
        calls: Positional and keyword arguments of real calls that differ in latents, prompt and timestep. At least two
            of them must have the same signature.
        deterministic_rows: Rows that a deterministic batcher fills every batch up to. If given, an answer must be
            bitwise the same regardless of the other rows in the batch.

    Returns:
        Why calls must not be joined, in one sentence, or None if they may. Requests can take turns on the module
        either way, with a `StepBatcher` of one row.

    Raises:
        Exception: A joined call failed.
    """
    collator = Collator(module, exact=bool(deterministic_rows))
    bound = [collator.bind(args, kwargs, {}) for args, kwargs in calls]
    joinable = max(([each for each in bound if each.signature == call.signature] for call in bound), key=len)
    if len(joinable) < 2:
        return "No two of its calls can be joined: all sample calls have different signatures."
    together = _answers(collator, module, joinable)
    alone = [_answers(collator, module, [call])[0] for call in joinable]
    for joined, single in zip(together, alone, strict=True):
        error, tolerance = compare(joined, single)
        if not error <= tolerance:
            return f"Answers to joined and single calls differ by {error:.1e}; at most {tolerance:.0e} is allowed."
    if deterministic_rows and not _is_deterministic(collator, module, joinable, deterministic_rows):
        return "The last bits of an answer depend on the other rows in the batch."
    return None


def _answers(collator: Collator, module: Any, calls: Sequence[Call], padded_rows: int = 0) -> list[Any]:
    rows = max(padded_rows, sum(call.rows for call in calls))
    args, kwargs = collator.join(calls, rows)
    return collator.split(module(*args, **kwargs), calls, rows)


def _is_deterministic(collator: Collator, module: Any, calls: Sequence[Call], rows: int) -> bool:
    """Whether the first call's answer is the same alone, and last in a batch that is full of other calls."""
    first, *others = calls
    count = max(0, (rows - first.rows) // max(call.rows for call in others))
    before = [others[number % len(others)] for number in range(count)]
    alone = _answers(collator, module, [first], rows)[0]
    last = _answers(collator, module, [*before, first], rows)[-1]
    return all(torch.equal(a, b) for a, b in zip(tensors(alone), tensors(last), strict=True))
