"""The device behind CUDA graphs. Everything that only CUDA can do is here, so that the rest is tested without it."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any, Protocol

import torch

from calotype_server.engine.memory import keep_cached_memory, release_cached_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["CudaBackend", "Graph", "GraphBackend"]


class Graph(Protocol):
    """The kernels of one call, with fixed addresses; `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Launches all kernels on the current stream."""
        ...

    def reset(self) -> None:
        """Frees the graph. It cannot be replayed any more."""
        ...


class GraphBackend(Protocol):
    """Captures calls. After `start`, only one thread uses it."""

    @property
    def device(self) -> torch.device:
        """Where the calls are computed."""
        ...

    def start(self) -> None:
        """Prepares the calling thread."""
        ...

    def stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a copy of a CPU tensor from which the device can copy while the CPU continues."""
        ...

    def warming_up(self) -> contextlib.AbstractContextManager[None]:
        """Opens a block that computes where `capture` will, after all earlier work and before all later work."""
        ...

    def capture(self, compute: Callable[[], Any]) -> tuple[Graph, Any]:
        """Records what a function launches, without computing it.

        Returns:
            The graph, and the function's result, whose tensors get their values in each replay.

        Raises:
            Exception: The function failed, or did what is forbidden in a graph, such as to wait for the device.
        """
        ...

    def synchronize(self) -> None:
        """Waits until everything is computed.

        Raises:
            torch.AcceleratorError: The device failed.
        """
        ...

    def free_bytes(self) -> int:
        """Gives cached memory back, and returns the bytes of device memory that are free."""
        ...

    def release(self) -> None:
        """Frees the memory that graphs share. All of them must be reset."""
        ...


class CudaBackend:
    """Captures CUDA graphs; see `GraphBackend`. Follows PyTorch's documentation; it has not run on a GPU yet.

    All graphs share one memory pool, because only one of them runs at a time. Calls warm up and are captured on one
    separate stream, and replayed on the caller's.

    Args:
        device: A CUDA device with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._invalid: list[torch.cuda.CUDAGraph] = []
        """Graphs whose capture could not be ended. Torch's allocator for pinned memory refers to them for good."""

    @property
    def device(self) -> torch.device:
        """Where the calls are computed."""
        return self._device

    def start(self) -> None:
        """Selects the device for the calling thread, and creates the stream for captures."""
        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies to pinned memory. Torch does not reuse it before the copies from it are done."""
        return tensor.pin_memory()

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """Computes on the stream for captures: cuBLAS, for example, allocates its workspace for each stream."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def capture(self, compute: Callable[[], Any]) -> tuple[Graph, Any]:
        """Captures on the separate stream; other threads may use the device meanwhile.

        `torch.cuda.graph` is not used, because it leaves its stream selected if the capture fails.
        """
        assert self._stream is not None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with keep_cached_memory(), _no_garbage_collection(), torch.cuda.stream(self._stream):
            try:
                # In the mode "global", an allocation by any other thread would make the capture fail.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = compute()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # It says that the capture is invalid.
                        graph.capture_end()
                    raise
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
        return graph, output

    def synchronize(self) -> None:
        """Waits for all streams of the device."""
        torch.cuda.synchronize(self._device)

    def free_bytes(self) -> int:
        """Empties torch's cache, and asks the driver. Memory that other processes allocate counts as used."""
        torch.cuda.synchronize(self._device)
        release_cached_memory(self._device)
        return torch.cuda.mem_get_info(self._device)[0]

    def release(self) -> None:
        """Drops the pool; torch fails if a pool without graphs is used again."""
        self._pool = None
        release_cached_memory(self._device)

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Does for a failed capture what torch does only for one that ended.

        Torch's allocator would otherwise count the capture as underway: it would keep its memory, and refuse to release
        any cached memory of the process. Source: `CUDAGraph.cpp` and `CUDACachingAllocator.cpp` of PyTorch 2.13.
        """
        try:
            graph.pool()
        except RuntimeError:  # The capture has not ended.
            # Errors: the allocator does not count it as underway, or these internal functions of torch are others.
            with contextlib.suppress(RuntimeError, AttributeError, TypeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                torch._C._cuda_releasePool(self._device.index, self._pool)
            self._invalid.append(graph)
            # The allocator for pinned memory still counts the capture as underway, and refuses another one in its pool.
            self._pool = None
        graph.reset()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keeps tensors and events in unreachable cycles until the block has ended: freeing them could break a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
