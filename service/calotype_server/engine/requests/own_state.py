"""Finds the parts of a pipeline that keep state between calls, and copies them for a request.

There is no list of classes. Modules with weights are shared; so are tokenizers and processors, behind a lock. All
other objects of a pipeline, such as guiders, further schedulers and image processors, are small, and may keep state:
each request gets its own copies.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
import transformers
from diffusers.configuration_utils import FrozenDict

__all__ = ["is_locked", "own_state", "uncopyable"]

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    str,
    bytes,
    type,
    torch.device,
    torch.dtype,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    FrozenDict,
)
"""Types whose values cannot change, or that only refer to code."""

_LOCKED_NAMES = ("tokenizer", "processor")
_LOCKED = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)

_BOOKKEEPING = ("_all_hooks", "_progress_bar_config")
"""Attributes of a pipeline that a view replaces, or that belong to the shared modules."""


def is_locked(name: str, value: Any) -> bool:
    """Whether requests share a component behind a lock: a tokenizer, or a processor that contains one."""
    return value is not None and (name.startswith(_LOCKED_NAMES) or isinstance(value, _LOCKED))


def own_state(pipeline: Any, view: Any, *, except_for: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Returns copies of everything in a pipeline that may keep state, by attribute.

    Args:
        pipeline: Not changed.
        view: Takes the pipeline's place where a copy refers to it.
        except_for: Attributes that need no copy.
    """
    return _copies(pipeline, view, except_for)[0]


def uncopyable(pipeline: Any) -> str | None:
    """Returns why requests must not even take turns on a pipeline, in one sentence, or None if they may."""
    _, failed = _copies(pipeline, pipeline, frozenset({"scheduler"}))
    if not failed:
        return None
    name, kind = next(iter(failed.items()))
    return f"Its {name}, a {kind}, cannot be copied for each request, and may keep state."


def _copies(pipeline: Any, view: Any, except_for: frozenset[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns copies by attribute, and the class of each attribute that cannot be copied."""
    attributes = {name: value for name, value in vars(pipeline).items() if name not in except_for}
    shared = {name: value for name, value in attributes.items() if _is_shared(name, value)}
    # Copies refer to the same modules, and not to copies of them.
    memo = {id(value): value for value in shared.values()} | {id(pipeline): view}
    copies, failed = {}, {}
    for name, value in attributes.items():
        if name in shared or name in _BOOKKEEPING or isinstance(value, _PLAIN):
            continue
        try:
            copies[name] = copy.deepcopy(value, memo)
        except Exception:  # of any kind: the component is not made for copies
            failed[name] = type(value).__name__
    return copies, failed


def _is_shared(name: str, value: Any) -> bool:
    return isinstance(value, torch.nn.Module) or is_locked(name, value)
