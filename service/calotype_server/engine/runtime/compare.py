"""Compares two answers of a denoiser, within what rounding in their number format can explain."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["compare", "tensors"]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_TF32_TOLERANCE = 2e-3
"""For float32 on CUDA, where convolutions round to ten bits by default."""


def compare(answer: Any, expected: Any) -> tuple[float, float]:
    """Returns the largest error relative to the largest expected value (NaN if there is one), and what is allowed."""
    worst, allowed = 0.0, math.inf
    for a, b in zip(tensors(answer), tensors(expected), strict=True):
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


def tensors(answer: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of an answer, in order."""
    if isinstance(answer, torch.Tensor):
        yield answer
    elif isinstance(answer, dict):
        yield from tensors(list(answer.values()))
    elif isinstance(answer, (list, tuple)):
        for part in answer:
            yield from tensors(part)
