"""Stands in for the text encoders of tiny pipelines: every prompt gets its own seeded embeddings."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from support.engine.tiny_inputs import words

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TOKENS", "mask", "pair", "speaking"]

TOKENS = 6
"""Tokens of every prompt."""


def pair(call: Any, *shape: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the embeddings of a call's prompt, and with classifier-free guidance also of its negative prompt."""
    guided = getattr(call, "do_classifier_free_guidance", True)
    return words(call.prompt, *shape), words(call.negative_prompt, *shape) if guided else None


def mask(dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Returns the mask of a prompt, all of whose tokens count."""
    return torch.ones(1, TOKENS, dtype=dtype)


def speaking(pipeline: Any, answer: Callable[[Any], Any], method: str = "encode_prompt") -> Any:
    """Replaces a method of a pipeline that encodes prompts, and returns the pipeline.

    Args:
        pipeline: A pipeline without text encoders.
        answer: Receives the arguments of the call as attributes; returns the method's result.
        method: Name of the method.
    """
    signature = inspect.signature(getattr(pipeline, method))

    def encode(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return answer(SimpleNamespace(**bound.arguments))

    setattr(pipeline, method, encode)
    return pipeline
