"""Correctness checks at load: may requests share the denoiser, and may their calls be joined?

They make "any pipeline" honest: calls of an unknown model are joined only after joined answers were compared with
single ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from calotype_server.engine.runtime.check import answers, is_deterministic, joinable
from calotype_server.engine.runtime.compare import compare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.engine.requests.sample_calls import Arguments
    from calotype_server.engine.runtime.base import DenoiserRuntime

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
def verify(runtime: DenoiserRuntime, calls: Sequence[Arguments], *, deterministic_rows: int = 0) -> str | None:
    """Compares the answers to joined calls with the answers to the same calls one by one.

    Args:
        runtime: Computes the denoiser.
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
    group = joinable(runtime, calls)
    if len(group) < 2:
        return "No two of its calls can be joined: all sample calls have different signatures."
    together = answers(runtime, group)
    alone = [answers(runtime, [call])[0] for call in group]
    for joined, single in zip(together, alone, strict=True):
        error, tolerance = compare(joined, single)
        if not error <= tolerance:
            return f"Answers to joined and single calls differ by {error:.1e}; at most {tolerance:.0e} is allowed."
    if deterministic_rows and not is_deterministic(runtime, group, deterministic_rows):
        return "The last bits of an answer depend on the other rows in the batch."
    return None
