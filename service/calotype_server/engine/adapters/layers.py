"""Adds LoRAs to the outputs of a module's layers, while the layers themselves stay as they are.

A layer with the LoRAs i of scale s_i computes `layer(x) + sum(s_i * up_i(down_i(x)))`; Hu et al. 2021, arXiv
2106.09685. The rows of a batch may have different LoRAs: each request owns a range of rows, and its LoRAs are added to
that range. Nothing is merged into the weights, so any combination of LoRAs and scales costs the same.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from calotype_server.types import Lora

__all__ = ["AdaptedLayer", "LayerDelta", "RowRange", "RowsMismatch", "applied"]

_MOST_STACKED = 2**17
"""Numbers in the stacked weights of one layer. The products of a larger layer take longer than the calls for them."""


class RowsMismatch(Exception):
    """The first dimension of a layer's input does not have one entry for each row of the batch."""


@dataclass(frozen=True, slots=True)
class RowRange:
    """LoRAs of consecutive rows of a batch.

    Attributes:
        start: First row.
        end: The row after the last.
        loras: LoRAs to add.
    """

    start: int
    end: int
    loras: tuple[Lora, ...]


class LayerDelta:
    """The change that one LoRA makes to one linear or convolutional layer.

    Args:
        down: Maps the layer's input to the rank of the LoRA.
        up: Maps that to the layer's output.
        scaling: Factor of the result at a scale of 1: alpha over rank.
    """

    def __init__(self, down: torch.nn.Module, up: torch.nn.Module, scaling: float) -> None:
        self.scaling = scaling
        parts = (down, up)
        self.is_linear = all(isinstance(part, torch.nn.Linear) and part.bias is None for part in parts)
        self._parts: tuple[Any, Any] = (down.requires_grad_(False).eval(), up.requires_grad_(False).eval())

    @property
    def tensor_count(self) -> int:
        """Number of weights and biases."""
        return sum(1 for part in self._parts for _ in part.parameters())

    def parts_for(self, x: torch.Tensor) -> tuple[Any, Any]:
        """Returns both parts, with the device and the number format of the layer's input."""
        down, up = parts = self._parts
        if down.weight.device != x.device or down.weight.dtype != x.dtype:
            # Offloaded layers compute elsewhere, and quantised layers in another format than they store.
            # Copies, because another thread may be using the old ones.
            down, up = (copy.deepcopy(part).to(x.device, x.dtype) for part in parts)
            self._parts = parts = (down, up)
        return parts


@dataclass(frozen=True, slots=True)
class _Addition:
    """One LoRA of one range of rows.

    Attributes:
        start: First row.
        count: Number of rows.
        delta: Its change of the layer.
        factor: Factor of the change.
    """

    start: int
    count: int
    delta: LayerDelta
    factor: float


class AdaptedLayer:
    """A layer, and the changes that LoRAs make to it.

    Args:
        layer: The layer; only `applied` changes it, for the time of a block.
        deltas: The change of each LoRA, by its name.
    """

    def __init__(self, layer: torch.nn.Module, deltas: Mapping[str, LayerDelta]) -> None:
        self.layer = layer
        self._deltas = dict(deltas)
        self._stack: tuple[Any, _Stack] | None = None
        """The weights of the newest choice of LoRAs, which usually stays for many steps, and that choice."""

    def add(self, name: str, delta: LayerDelta) -> None:
        """Adds the change of another LoRA."""
        self._deltas[name] = delta

    def add_to(self, result: torch.Tensor, x: torch.Tensor, loras: Sequence[Lora]) -> None:
        """Adds the changes of LoRAs for the input `x` to `result`, in place."""
        _add(result, x, self._additions([RowRange(0, 1, tuple(loras))]), 1)

    def free_memory(self) -> bool:
        """Drops the stacked weights. Returns whether there were any."""
        stack, self._stack = self._stack, None
        return stack is not None

    def forward(self, ranges: Sequence[RowRange], rows: int, *, exact: bool) -> Callable[..., torch.Tensor] | None:
        """Returns the layer's computation with LoRAs; None if none of the LoRAs changes this layer.

        Args:
            ranges: LoRAs of the rows. A single range of all rows also covers inputs whose first dimension is not the
                rows of the batch.
            rows: Rows of the batch.
            exact: Whether the other ranges must not change a bit of a range.

        The function raises `RowsMismatch`.
        """
        additions = self._additions(ranges)
        if not additions:
            return None
        plain = self.layer.forward
        uniform = len(ranges) == 1 and ranges[0].end - ranges[0].start == rows

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not uniform and x.shape[0] != rows:
                raise RowsMismatch(f"A layer got {x.shape[0]} entries for {rows} rows.")
            result = plain(x, *args, **kwargs)
            plainly = uniform or exact or result.dtype != x.dtype
            stack = None if plainly else self._stack_for(tuple(ranges), rows, additions, x)
            if stack is None:
                _add(result, x, additions, rows)
            else:
                result.baddbmm_(torch.bmm(x, stack.down), stack.up)
            return result

        return forward

    def _stack_for(
        self, ranges: tuple[RowRange, ...], rows: int, additions: Sequence[_Addition], x: torch.Tensor
    ) -> _Stack | None:
        """Returns the weights of each row; None if the layer is not linear or not small."""
        if x.ndim != 3 or not all(each.delta.is_linear for each in additions):
            return None
        key = (ranges, rows, x.dtype, x.device)
        if self._stack is None or self._stack[0] != key:
            stack = _stacked(additions, rows, x)
            if stack is None:
                return None
            self._stack = (key, stack)
        return self._stack[1]

    def _additions(self, ranges: Sequence[RowRange]) -> list[_Addition]:
        return [
            _Addition(each.start, each.end - each.start, delta, lora.scale * delta.scaling)
            for each in ranges
            for lora in each.loras
            if (delta := self._deltas.get(lora.name)) is not None
        ]


@dataclass(frozen=True, slots=True)
class _Stack:
    """The weights of all LoRAs of each row, so that two products serve all rows.

    Attributes:
        down: (rows, inputs, rank).
        up: (rows, rank, outputs), with the factors. Rows without LoRAs have zeros.
    """

    down: torch.Tensor
    up: torch.Tensor


def _stacked(additions: Sequence[_Addition], rows: int, x: torch.Tensor) -> _Stack | None:
    """Returns the weights of each row for the input `x`; None if they are large."""
    parts = [each.delta.parts_for(x) for each in additions]
    ends = [0] * rows
    places = []
    for each, (down, _) in zip(additions, parts, strict=True):
        start = ends[each.start]
        places.append(start)
        ends[each.start : each.start + each.count] = [start + down.out_features] * each.count
    inputs, outputs = parts[0][0].in_features, parts[0][1].out_features
    if rows * max(ends) * (inputs + outputs) > _MOST_STACKED:
        return None
    stack = _Stack(x.new_zeros(rows, inputs, max(ends)), x.new_zeros(rows, max(ends), outputs))
    for each, (down, up), start in zip(additions, parts, places, strict=True):
        own, ranks = slice(each.start, each.start + each.count), slice(start, start + down.out_features)
        stack.down[own, :, ranks] = down.weight.t()
        stack.up[own, ranks] = each.factor * up.weight.t()
    return stack


def _add(result: torch.Tensor, x: torch.Tensor, additions: Sequence[_Addition], rows: int) -> None:
    """Adds the changes for the input `x` of a layer to its `result`, in place.

    The first dimension of both has `rows` entries, unless all rows have the same LoRAs.
    """
    flat = result.is_contiguous() and result.dtype == x.dtype
    if flat:
        # One matrix for all rows. Its views are cheaper than those of tensors with more dimensions.
        inputs, outputs = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
    for each in additions:
        down, up = each.delta.parts_for(x)
        whole = each.count == rows
        if flat and each.delta.is_linear:
            size = inputs.shape[0] // rows
            part = inputs if whole else inputs.narrow(0, each.start * size, each.count * size)
            target = outputs if whole else outputs.narrow(0, each.start * size, each.count * size)
            target.addmm_(torch.mm(part, down.weight.t()), up.weight.t(), alpha=each.factor)
        elif whole:
            result.add_(up(down(x)), alpha=each.factor)
        else:
            part = x.narrow(0, each.start, each.count)
            result.narrow(0, each.start, each.count).add_(up(down(part)), alpha=each.factor)


@contextlib.contextmanager
def applied(
    layers: Sequence[AdaptedLayer], ranges: Sequence[RowRange], rows: int, *, exact: bool = False
) -> Iterator[None]:
    """Lets layers add LoRAs during a block, in which only one thread may use their module.

    Without LoRAs the layers are exactly those of the model: requests without LoRAs pay nothing.

    Args:
        layers: All layers that LoRAs change.
        ranges: LoRAs of the rows, in order; rows in none of them have no LoRA.
        rows: Rows of the batch.
        exact: Whether the other ranges must not change a bit of a range.
    """
    replaced: list[tuple[dict[str, Any], Any]] = []
    try:
        for each in layers:
            forward = each.forward(ranges, rows, exact=exact)
            if forward is not None:
                # Past `Module.__setattr__`, which takes longer. Hooks may have set a `forward` of their own.
                attributes = each.layer.__dict__
                replaced.append((attributes, attributes.get("forward")))
                attributes["forward"] = forward
        yield
    finally:
        for attributes, before in replaced:
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before
