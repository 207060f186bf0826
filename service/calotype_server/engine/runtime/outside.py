"""Watches a call: which tensors it reads in addition to its arguments, and whether it waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["OutsideTensors"]

_READING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount", "_unique", "_unique2"}
"""Operations whose result the CPU waits for."""

_COPYING = {"_to_copy", "copy_", "lift_fresh"}
"""Operations that may copy between the device and ordinary memory; the last one is all that is seen of a constant."""

_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that wait for the CPU to count the values of a mask."""


class OutsideTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects every tensor that exists before the block and is read in it, such as weights and cached positions.

    A graph reads their memory at each replay without owning it. A model may drop a cached tensor, and LoRA replaces
    weights, so the owner of the graph must keep these tensors.

    Args:
        device: Where the block computes.

    Attributes:
        tensors: The tensors, one for each piece of memory.
        waits: The name of an operation after which the CPU waits for the device, which is forbidden in a graph; or
            None. It does not find all of them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[torch.Tensor] = []
        self.waits: str | None = None
        self._device = device
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        for tensor in given:
            if (memory := tensor.untyped_storage()._cdata) not in self._known:
                self._known.add(memory)
                self.tensors.append(tensor)
        result = func(*args, **(kwargs or {}))
        # Memory that the block allocates. If it is freed, its number can only return for memory of the block.
        self._known.update(tensor.untyped_storage()._cdata for tensor in _tensors(result))
        if self._waits_for_device(func.overloadpacket.__name__, given, _tensors(result)):
            self.waits = str(func)
        return result

    def _waits_for_device(self, name: str, given: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
        devices = {each.device for each in given + results}
        if self._device not in devices:
            return False
        if name in _COPYING:
            return name == "lift_fresh" or len(devices) > 1
        return name in _READING or (name in _INDEXING and any(each.dtype == torch.bool for each in given[1:]))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
