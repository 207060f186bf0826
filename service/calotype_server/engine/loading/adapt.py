"""Makes the few pipelines that return other tensors return images in the range 0 to 1, like all others."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["adapted"]

_UNSCALED = frozenset({"Kandinsky3Pipeline"})
"""Pipelines whose output of the type "pt" is the decoder's, -1 to 1; they only scale other types."""


def adapted(pipeline: Any) -> Any:
    """Returns a pipeline whose call with `output_type="pt"` returns (batch, 3, height, width), 0 to 1."""
    kind = type(pipeline)
    if kind.__name__ not in _UNSCALED:
        return pipeline

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.__call__(self, *args, **kwargs)
        if kwargs.get("output_type") != "pt":
            return output
        images = (output[0] * 0.5 + 0.5).clamp(0, 1)
        return type(output)(images) if kwargs.get("return_dict", True) else (images,)

    pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return pipeline
