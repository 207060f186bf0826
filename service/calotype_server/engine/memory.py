"""Memory: how much this process may use, how much a call needs, and errors that say that it ran out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "free_memory",
    "is_device_failure",
    "is_out_of_memory",
    "keep_cached_memory",
    "peak_memory",
    "release_cached_memory",
    "return_large_blocks",
]

_log = structlog.get_logger(__name__)

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_STATM = Path("/proc/self/statm")

_M_MMAP_THRESHOLD = -3
"""From malloc.h of glibc."""
_LARGE_BLOCK = 4 * 2**20
"""Bytes. The tensors of a small image stay below it, so that they do not cost a system call."""

_COUNTED = ("cuda", "xpu")
"""Devices whose memory torch counts. Both have the same functions."""

_cached_memory = threading.Lock()
"""Held while cached memory is released, or must not be."""

_EXHAUSTED = re.compile(
    r"DefaultCPUAllocator"  # Torch has no exception type for the host.
    # "CUDA error: out of memory" and "CUDA driver error: ..." from calls outside of torch's allocator; Triton's
    # "Triton Error [CUDA]: ..."; "MPS backend out of memory (MPS allocated: ...".
    r"|\b(?:CUDA|HIP|XPU|MPS)\]?(?: driver| backend)?(?: error)?:? out of memory"
    r"|\bInvalid buffer size: [\d.]+ "  # A single tensor that is too large for Metal.
    # Workspaces of cuBLAS, cuDNN (under its old and its new name), cuFFT and their HIP equivalents.
    r"|\b(?:CU|HIP|ROC)[A-Z]+_(?:[A-Z]+_)*ALLOC(?:ATION)?_FAILED\b"
    # Level Zero, under its old and its new name.
    r"|\b(?:UR_RESULT|PI)_ERROR_OUT_OF_(?:DEVICE_MEMORY|HOST_MEMORY|RESOURCES)\b"
)
_LOST = re.compile(r"\b(?:UR_RESULT|PI)_ERROR_DEVICE_LOST\b")
"""XPU has no exception type for a device that failed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory ran out, on a device or on the host, according to an exception or to its causes."""
    return any(
        isinstance(each, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(each, RuntimeError) and _EXHAUSTED.search(str(each)) is not None)
        for each in _causes(error)
    )


def is_device_failure(error: BaseException) -> bool:
    """Returns whether a device failed, according to an exception or to its causes; only a new process can use it again.

    Exhausted memory is not a failure, although torch reports it as an `AcceleratorError` in some places.
    """
    return not is_out_of_memory(error) and any(
        isinstance(each, torch.AcceleratorError)
        or (isinstance(each, RuntimeError) and _LOST.search(str(each)) is not None)
        for each in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        yield each
        each = each.__cause__


@contextlib.contextmanager
def keep_cached_memory() -> Iterator[None]:
    """Opens a block in which no thread releases cached memory: that would make the capture of a CUDA graph fail."""
    with _cached_memory:
        yield


def release_cached_memory(device: torch.device) -> None:
    """Returns memory that torch has cached on a device, and that no tensor uses, to the device.

    Raises:
        RuntimeError: The device failed; see `is_device_failure`. Any other error is logged: the caller can continue.
    """
    if device.type not in (*_COUNTED, "mps"):
        return
    try:
        with _cached_memory:
            getattr(torch, device.type).empty_cache()
    except RuntimeError as error:
        if is_device_failure(error):
            raise
        _log.warning("cached memory cannot be released", device=str(device), error=str(error))


def return_large_blocks() -> None:
    """Makes the C library return every large block to the system when it is freed.

    glibc raises its threshold up to 32 MiB by itself, and each thread keeps blocks below it. With eight generations of
    512 x 512 pixels, the bundled model then used 1.6 GB instead of 0.4 GB. The environment variable
    `MALLOC_MMAP_THRESHOLD_` takes precedence; other C libraries are not changed.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that this process may use on a device in addition to those in use; None if that is unknown.

    On a CPU, the limit is that of the control groups (v1 or v2), or else the physical memory. On CUDA and XPU, memory
    that other processes use is not free, and memory that torch has cached is. On MPS it is unknown.
    """
    if device.type in _COUNTED:
        backend = getattr(torch, device.type)
        try:
            free, _ = backend.mem_get_info(device)
        except RuntimeError:
            if device.type == "cuda":
                raise
            return None  # Some drivers of XPU cannot report it.
        return int(free + backend.memory_reserved(device) - backend.memory_allocated(device))
    if device.type != "cpu":
        return None
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([physical, *_cgroup_limits()]) - _resident())


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Returns the most bytes that a call needs at once, in addition to those in use when it starts.

    On a CPU, only the tensors that torch's operations return count, not the memory that an operation uses internally:
    torch's profiler knows that memory, but it writes to the standard error stream.

    Args:
        call: Allocates on the device, from this thread.
        device: A CPU, CUDA or XPU device.
    """
    if device.type in _COUNTED:
        backend = getattr(torch, device.type)
        backend.synchronize(device)
        before = backend.memory_allocated(device)
        backend.reset_peak_memory_stats(device)
        call()
        backend.synchronize(device)
        return int(backend.max_memory_allocated(device) - before)
    with _AllocatedBytes() as allocated:
        call()
    return allocated.peak


class _AllocatedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are created while the mode is active.

    Attributes:
        peak: Most bytes at the same time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._bytes = 0
        self._counted: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            # Views and results in place share the storage of an argument, such as a weight.
            if id(storage) not in given and id(storage) not in self._counted:
                self._counted[id(storage)] = storage.nbytes()
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage))
        self.peak = max(self.peak, self._bytes)
        return result

    def _freed(self, storage: int) -> None:
        self._bytes -= self._counted.pop(storage)


def _storages(values: Any) -> Iterator[Any]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def _resident() -> int:
    """Bytes of memory that this process uses; the most that it has used, on systems that say no more."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _cgroup_limits() -> list[int]:
    """Returns the memory limits, in bytes, of the control groups of this process and of those above them."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, file = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, file = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = root / group.lstrip("/")
        # In a container, the path may be one of the host that does not exist here. The limit is then at the root.
        for each in (folder, *folder.parents):
            if each.is_relative_to(root) and (limit := _read_limit(each / file)) is not None:
                found.append(limit)
    return found


def _read_limit(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
