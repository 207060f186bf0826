"""Tiny pipelines of further families with random weights, for `service/MODELS.md` and tests of its claims.

`tiny.FAMILIES` are those that most tests of the engine use. These here cost a test as much, and add less: they are
tried once, as a whole.
"""

from __future__ import annotations

from typing import Any

import torch

from calotype_server.engine.capabilities import denoiser_name
from support.engine import tiny
from support.engine.families.packed import PACKED
from support.engine.families.transformers import TRANSFORMERS
from support.engine.families.unets import UNETS

__all__ = ["ALL", "prompted"]

_OTHERS = {**UNETS, **TRANSFORMERS, **PACKED}

ALL = tuple(sorted((*tiny.FAMILIES, *_OTHERS)))
"""Names of all tiny pipelines."""


def prompted(family: str) -> Any:
    """Builds a pipeline that accepts prompts; two builds of a family are equal."""
    if family not in _OTHERS:
        return tiny.prompted(family)
    return tiny.seeded_build(lambda: _awake(_OTHERS[family]()))


def _awake(pipeline: Any) -> Any:
    """Fills weights of the denoiser that start at zero, so that it answers something; returns the pipeline."""
    with torch.no_grad():
        for weights in getattr(pipeline, denoiser_name(pipeline)).parameters():
            if weights.ndim > 1 and not weights.any():
                torch.nn.init.normal_(weights, std=0.2)
    return pipeline
