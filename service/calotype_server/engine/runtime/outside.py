"""Finds the tensors that a call reads in addition to its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["OutsideTensors"]


class OutsideTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects every tensor that exists before the block and is read in it, such as weights and cached positions.

    A graph reads their memory at each replay without owning it. A model may drop a cached tensor, and LoRA replaces
    weights, so the owner of the graph must keep these tensors.

    Attributes:
        tensors: The tensors, one for each piece of memory.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[torch.Tensor] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            if (memory := tensor.untyped_storage()._cdata) not in self._known:
                self._known.add(memory)
                self.tensors.append(tensor)
        result = func(*args, **(kwargs or {}))
        # Memory that the block allocates. If it is freed, its number can only return for memory of the block.
        self._known.update(tensor.untyped_storage()._cdata for tensor in _tensors(result))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
