"""Decides, when the model loads, whether calls with different LoRAs may be joined."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.batching.plan import deterministic_rows
from calotype_server.engine.memory import is_device_failure
from calotype_server.engine.requests.sample_calls import sample_calls
from calotype_server.engine.runtime.check import answers, is_deterministic, joinable
from calotype_server.engine.runtime.compare import compare
from calotype_server.engine.runtime.lora import LoraRuntime
from calotype_server.types import Lora

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.engine.adapters.loras import Loras
    from calotype_server.engine.batching.plan import Plan, PlanOptions
    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.engine.runtime.collate import Call
    from calotype_server.types import ModelInfo

__all__ = ["lora_runtime", "why_not_mixed"]

_log = structlog.get_logger(__name__)


@torch.no_grad()
def lora_runtime(
    runtime: DenoiserRuntime, loras: Loras, pipeline: Any, model: ModelInfo, plan: Plan, options: PlanOptions
) -> LoraRuntime:
    """Returns a runtime that also computes calls with LoRAs, after a comparison of joined calls with single ones.

    The comparison takes a few calls of the denoiser. Its result is not cached, because it depends on the LoRAs.

    Args:
        runtime: Computes calls without LoRAs.
        loras: The LoRAs of the model.
        pipeline: The loaded pipeline; not changed.
        model: Its description.
        plan: The batching plan.
        options: The operator's settings.
    """
    mixing = LoraRuntime(runtime, loras, exact=options.deterministic)
    if plan.reason or plan.max_rows <= 1:
        return mixing  # Calls are not joined anyway.
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(plan.threads.of(plan.max_rows))
        calls = joinable(mixing, sample_calls(pipeline, model))
        reason = why_not_mixed(mixing, calls, loras.names, deterministic_rows(options, calls[0].rows))
    finally:
        torch.set_num_threads(before)
    if reason is None:
        return mixing
    _log.warning("calls with different LoRAs are not joined", reason=reason)
    return LoraRuntime(runtime, loras, exact=options.deterministic, mixes=False)


def why_not_mixed(runtime: LoraRuntime, calls: Sequence[Call], names: Sequence[str], exact_rows: int) -> str | None:
    """Returns why calls with different LoRAs must not be joined, in one sentence, or None if they may.

    Args:
        runtime: Computes the calls.
        calls: Real calls that can be joined, if all have the same LoRAs.
        names: Names of all LoRAs.
        exact_rows: Rows of every batch of a deterministic server, or else 0.

    Raises:
        RuntimeError: The device failed; see `is_device_failure`.
    """
    # All LoRAs at once reach every layer. Together, they are about as strong as one.
    strength = 1 / len(names)
    choices = (tuple(Lora(name, strength) for name in names), (), (Lora(names[0], -0.5),))
    mixed = [replace(call, loras=chosen) for call, chosen in zip(calls, choices, strict=False)]
    if len(mixed) < 2:
        return "No two of the sample calls can be joined."
    try:
        together = answers(runtime, mixed)
        alone = [answers(runtime, [call])[0] for call in mixed]
        for joined, single in zip(together, alone, strict=True):
            error, tolerance = compare(joined, single)
            if not error <= tolerance:
                return f"Answers to joined and single calls differ by {error:.1e}; at most {tolerance:.0e} is allowed."
        if exact_rows and not is_deterministic(runtime, mixed, exact_rows):
            return "The last bits of an answer depend on the other rows in the batch."
    except Exception as error:
        if is_device_failure(error):
            raise
        return f"A joined call failed with {type(error).__name__}."
    return None
