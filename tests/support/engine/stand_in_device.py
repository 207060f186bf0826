"""A stand-in for a GPU: its tensors compute on the CPU, but it records everything that would wait for a GPU.

Torch knows the stand-in as `DEVICE`, a device type that computes nothing by itself. Every operation passes through the
`StandInDevice` while its block is open. As on a real GPU, operations that mix tensors of both devices fail, except for
CPU tensors without dimensions, which count as numbers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

__all__ = ["DEVICE", "OnDevice", "StandInDevice"]

DEVICE = torch.device("meta")

_READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "bincount", "_unique2"}
"""Operations whose result the CPU waits for."""

_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that copy an index to the device of the values."""


class OnDevice(torch.Tensor):
    """A tensor on the stand-in device.

    Attributes:
        on_cpu: The values, on the CPU.
    """

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.on_cpu = values
        return made

    def data_ptr(self) -> int:
        """Returns an address, which views share as they do on a real device."""
        return self.on_cpu.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} is called outside of the stand-in device's block")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"


class StandInDevice(TorchDispatchMode):
    """Runs the operations of the stand-in device in a `with` block.

    Attributes:
        reads: Number of times that the CPU waits for a value of the device, by operation.
        copies: Number of copies from ordinary memory to the device, which wait as well.
        operations: Every operation on a device tensor with three or more dimensions: its name, and for each operand
            without dimensions where it is and its dtype. A GPU rounds alike if these are equal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.operations: list[tuple[Any, ...]] = []
        self._constants = _Constants()

    def __enter__(self) -> Self:
        self._constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constants.__exit__(*error)

    def reset(self) -> None:
        """Forgets everything recorded so far."""
        self.reads.clear()
        self.copies.clear()
        self.operations.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_device = any(isinstance(each, OnDevice) for each in tensors)
        target = kwargs.get("device")
        to_device = on_device if target is None else torch.device(target).type == DEVICE.type
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        self._record(name, tensors, on_device, to_device)
        originals = {id(each.on_cpu): each for each in tensors if isinstance(each, OnDevice)}
        result = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        if not to_device or name in _READS - {"nonzero", "masked_select", "bincount", "_unique2"}:
            return result

        def wrapped(each: Any) -> Any:
            # An operation in place returns the tensor that it changed.
            return originals.get(id(each), OnDevice(each)) if isinstance(each, torch.Tensor) else each

        return tree_map(wrapped, result)

    def _record(self, name: str, tensors: list[torch.Tensor], on_device: bool, to_device: bool) -> None:
        here = [each for each in tensors if not isinstance(each, OnDevice)]
        if (on_device and name in _READS) or (name == "_to_copy" and on_device and not to_device):
            self.reads[name] += 1
        elif name == "_to_copy" and not on_device and to_device:
            self.copies[name] += 1
        elif name == "copy_" and on_device and here:
            (self.copies if isinstance(tensors[0], OnDevice) else self.reads)[name] += 1
        elif name in _INDEXING and on_device and here:
            assert isinstance(tensors[0], OnDevice) or all(each.ndim == 0 for each in tensors[1:]), name
            self.copies[name] += 1
        elif on_device:
            assert all(each.ndim == 0 for each in here), f"{name} mixes devices"
        if any(isinstance(each, OnDevice) and each.ndim > 2 for each in tensors):
            scalars = [(type(each).__name__, each.dtype) for each in tensors if not each.ndim]
            self.operations.append((name, *scalars))


def _values(each: Any) -> Any:
    return each.on_cpu if isinstance(each, OnDevice) else each


class _Constants(TorchFunctionMode):
    """Makes tensors of numbers on the CPU and copies them. Torch makes those of its type "meta" without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)
