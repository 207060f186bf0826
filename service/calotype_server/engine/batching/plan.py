"""How many generations share one denoiser, and how: found out when the model is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.batching.collate import Collator
from calotype_server.engine.batching.measure import Knee, Threads, knee, unbatchable, verify
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.sample_calls import sample_calls

if TYPE_CHECKING:
    from calotype_server.types import ModelInfo

__all__ = ["Plan", "make_plan"]

_log = structlog.get_logger(__name__)

_MOST_ACTIVE = 8
"""By default: more would take turns at steps so seldom that nobody saw anything move."""


_DETERMINISTIC_REQUESTS = 4
"""Default requests for each that all batches are filled up to."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found.

    Attributes:
        max_active: Generations at work at once.
        max_rows: Rows that the denoiser computes together; 1 when generations take turns, 0 when there is only one.
        reason: Why calls are not joined, in a sentence; empty when they are.
        threads: That torch computes calls of the denoiser with; None where each generation makes its own.
    """

    max_active: int
    max_rows: int
    reason: str
    threads: Threads | None = None


def make_plan(
    pipeline: Any,
    model: ModelInfo,
    *,
    max_active: int | None,
    threads: tuple[int, int],
    max_rows: int | None = None,
    deterministic: bool = False,
) -> Plan:
    """Measures the denoiser, unless only one generation at a time is wanted.

    Args:
        pipeline: Not changed.
        model: Its description.
        max_active: What the operator wants; None for what pays: twice as many as the denoiser computes together, so
            that some can decode their text or their picture meanwhile.
        threads: Of the CPU, what is quickest for one request, and how many there are.
        max_rows: Rows to compute together at most; None for what pays.
        deterministic: Whether a picture must be bitwise the same in any company. No choice is then left to
            measurements, so that the next start makes the same picture too.
    """
    if max_active == 1:
        return Plan(1, 0, "The server was started with --max-active 1.")
    module = getattr(pipeline, denoiser_name(pipeline))
    reason = unbatchable(module)
    if reason is not None:
        return Plan(1, 0, reason)
    before = torch.get_num_threads()
    try:
        calls = sample_calls(pipeline, model)
        rows = Collator(module).bind(*calls[0], {}).rows
        if deterministic:
            found = Knee(_DETERMINISTIC_REQUESTS * rows, Threads(threads[1], threads[1], math.inf))
        else:
            found = knee(module, calls[0], threads=threads, most=max_active or _MOST_ACTIVE)
        max_rows = max_rows or found.rows
        # The last bits depend on the number of threads.
        torch.set_num_threads(found.threads.of(max_rows))
        reason = verify(module, calls, deterministic_rows=max_rows if deterministic else 0)
    except Exception:
        _log.exception("the denoiser cannot be measured")
        return Plan(1, 0, "The denoiser could not be measured.")
    finally:
        torch.set_num_threads(before)
    if reason is not None:
        return Plan(max_active or 2, 1, reason, found.threads)
    return Plan(max_active or min(max(2, 2 * max_rows // rows), _MOST_ACTIVE), max_rows, "", found.threads)
