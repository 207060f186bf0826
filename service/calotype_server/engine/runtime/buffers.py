"""The memory in which a CUDA graph reads its arguments: written before each replay, at the same addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from calotype_server.engine.runtime.collate import Rows
from calotype_server.engine.runtime.signature import dtype_of, is_channels_last

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.engine.runtime.signature import Signature

__all__ = ["StaticInputs", "copied", "only_tensors"]

_NUMBERED = ("timestep", "timesteps", "t")
"""Arguments whose whole numbers may be changed without making the call invalid, unlike indices of tokens."""


class StaticInputs:
    """Copies of the tensors of a call, in memory that stays in place. Its plain values are kept as they are.

    Args:
        signature: The call; its values are written.
        device: Where the copies are.
        stage: Returns a copy of a CPU tensor from which the device can copy while the CPU continues.
    """

    def __init__(
        self, signature: Signature, device: torch.device, stage: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._device = device
        self._stage = stage
        self._tensors = [(name, self._allocate(given)) for name, given in signature.tensors()]
        copies = iter(tensor for _, tensor in self._tensors)
        self.named: dict[str, Any] = {
            each.name: tree_unflatten(
                [next(copies) if isinstance(leaf, (torch.Tensor, Rows)) else leaf for leaf in each.leaves], each.spec
            )
            for each in signature.arguments
        }
        """The arguments, by name; their tensors are the copies."""
        self.write(signature)

    def write(self, signature: Signature) -> None:
        """Replaces the values by those of a call with the same key. On a GPU, nothing waits."""
        for (_, static), (_, given) in zip(self._tensors, signature.tensors(), strict=True):
            if isinstance(given, Rows):
                self._write_rows(static, given.parts)
            else:
                self._copy(static, given)

    def disturb(self) -> None:
        """Replaces the values by other finite ones, to find values that a graph keeps although they may change."""
        for name, static in self._tensors:
            if static.is_floating_point():
                torch.nan_to_num(static.mul_(0.5), out=static)
            elif name in _NUMBERED:
                static.div_(2, rounding_mode="floor")

    def _allocate(self, given: torch.Tensor | Rows) -> torch.Tensor:
        if isinstance(given, torch.Tensor):
            return torch.empty_like(given, device=self._device)
        return torch.empty(
            (sum(part.shape[0] for part in given.parts), *given.parts[0].shape[1:]),
            dtype=dtype_of(given),
            device=self._device,
            memory_format=torch.channels_last if is_channels_last(given) else torch.contiguous_format,
        )

    def _write_rows(self, static: torch.Tensor, parts: list[torch.Tensor]) -> None:
        if all(part.device == self._device and part.dtype == static.dtype for part in parts):
            torch.cat(parts, out=static)
            return
        start = 0
        for part in parts:
            self._copy(static[start : start + part.shape[0]], part)
            start += part.shape[0]

    def _copy(self, target: torch.Tensor, given: torch.Tensor) -> None:
        if given.device.type == "cpu" and given.device != self._device:
            # Converted first: a copy that converts on its way to the device would go through ordinary memory, and wait.
            given = self._stage(given.to(target.dtype).contiguous())
        target.copy_(given, non_blocking=True)


def copied(output: Any) -> Any:
    """Returns an answer with copies of its tensors, which the next replay does not overwrite."""
    return tree_map_only(torch.Tensor, torch.Tensor.clone, output)


def only_tensors(output: Any) -> bool:
    """Whether `copied` finds all tensors of an answer: the rest of it is plain values."""
    return all(isinstance(leaf, (torch.Tensor, int, float, str, type(None))) for leaf in tree_leaves(output))
