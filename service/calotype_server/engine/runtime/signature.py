"""Identifies a call of the denoiser for a CUDA graph, and names the calls that no graph can compute.

A graph repeats the kernels of one call with the same addresses. Everything that decides which kernels run is therefore
part of its key: the names and the structure of the arguments, the shape, layout and number format of each tensor, and
each plain value. Only the values in the tensors may change.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from calotype_server.engine.runtime.collate import Rows

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

__all__ = ["Argument", "Refused", "Signature", "dtype_of", "is_channels_last", "sign", "why_not_module"]

_PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device)
"""Types of values that stay the same from step to step. A float, such as a timestep, would need a graph per step."""

_WAITING = {
    "ChromaTransformer2DModel": "copies a constant to the GPU in every call",
    "HiDreamImageTransformer2DModel": "reads the choice of experts back from the GPU",
    "Lumina2Transformer2DModel": "reads the lengths of the prompts back from the GPU",
}
"""Classes that wait for the GPU in every call, which is forbidden in a graph. From the source of diffusers 0.42."""

_WAITING_ARGUMENTS = {
    ("CogView4Transformer2DModel", "attention_kwargs"): "may read lengths back from the GPU",
    ("QwenImageTransformer2DModel", "encoder_hidden_states_mask"): "makes the model copy a constant to the GPU",
}
"""Arguments that make a class wait for the GPU, unless they are None."""


class Refused(Exception):
    """A call cannot be computed by a graph; the text says why."""


@dataclass(frozen=True, slots=True)
class Argument:
    """The values of one named argument.

    Attributes:
        name: Its name.
        leaves: Tensors, `Rows` and plain values, in the order of `spec`.
        spec: Their structure.
    """

    name: str
    leaves: list[Any]
    spec: TreeSpec


@dataclass(frozen=True, slots=True)
class Signature:
    """A call, taken apart.

    Attributes:
        key: Equal for calls that one graph can compute.
        arguments: The named arguments.
    """

    key: Hashable
    arguments: list[Argument]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor | Rows]]:
        """Yields the tensors of all arguments, and the names of these arguments."""
        for argument in self.arguments:
            for leaf in argument.leaves:
                if isinstance(leaf, (torch.Tensor, Rows)):
                    yield argument.name, leaf


def sign(module: Any, named: dict[str, Any]) -> Signature:
    """Takes the arguments of a call apart.

    Args:
        module: The denoiser; only its class is used.
        named: The arguments from `Collator.gather`.

    Raises:
        Refused: No graph can compute the call.
    """
    kind = _kind(module)
    arguments, keys = [], []
    for name, value in named.items():
        if value is not None and (reason := _WAITING_ARGUMENTS.get((kind, name))) is not None:
            raise Refused(f"The argument {name!r} {reason}.")
        leaves, spec = tree_flatten(value)
        arguments.append(Argument(name, leaves, spec))
        keys.append((name, spec, tuple(_sign(name, leaf) for leaf in leaves)))
    return Signature(tuple(keys), arguments)


def dtype_of(rows: Rows) -> torch.dtype:
    """Returns the number format of the concatenated tensor, which `torch.cat` would choose."""
    return functools.reduce(torch.promote_types, (part.dtype for part in rows.parts))


def is_channels_last(rows: Rows) -> bool:
    """Returns whether the concatenated tensor keeps its channels in the innermost dimension, as `torch.cat` would."""
    return all(
        part.ndim == 4 and not part.is_contiguous() and part.is_contiguous(memory_format=torch.channels_last)
        for part in rows.parts
    )


def why_not_module(module: Any, device: torch.device) -> str | None:
    """Returns why no call of a module can be computed by a graph, in one sentence, or None.

    Args:
        module: The denoiser.
        device: The device that computes graphs.
    """
    kind = _kind(module)
    if kind in _WAITING:
        return f"{kind} {_WAITING[kind]}."
    if getattr(module, "is_cache_enabled", False):
        return "Its cache decides at each step which layers to compute."
    if not isinstance(module, torch.nn.Module):
        return None
    if module.training:
        return "It is in training mode, and may draw random numbers."
    if any(parameter.device != device for parameter in module.parameters()):
        return f"Not all of its weights are on {device}."
    for part in module.modules():
        if hasattr(part, "_hf_hook") or part._forward_hooks or part._forward_pre_hooks or _stateful_hooks(part):
            return f"A hook of its {type(part).__name__} runs Python code in every call."
        attention = getattr(getattr(part, "processor", None), "_attention_backend", None)
        if "varlen" in str(getattr(attention, "value", attention)):
            return f"Its attention backend {attention} reads lengths back from the GPU."
    return None


def _kind(module: Any) -> str:
    return type(getattr(module, "_orig_mod", module)).__name__  # the module inside `torch.compile`'s wrapper


def _sign(name: str, leaf: Any) -> Hashable:
    if isinstance(leaf, Rows):
        first, count = leaf.parts[0], sum(part.shape[0] for part in leaf.parts)
        return ("rows", count, first.shape[1:], dtype_of(leaf), is_channels_last(leaf))
    if type(leaf) in (torch.Tensor, torch.nn.Parameter):
        return ("tensor", leaf.shape, leaf.stride(), leaf.dtype)
    if type(leaf) in _PLAIN:
        return (type(leaf), leaf)
    raise Refused(f"The argument {name!r} contains a {type(leaf).__name__}, which may differ at every step.")


def _stateful_hooks(part: torch.nn.Module) -> bool:
    """Whether diffusers' hooks of a module do more than change the number format of its weights."""
    hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
    return any(name != "layerwise_casting" for name in hooks)
