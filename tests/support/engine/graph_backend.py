"""A stand-in for CUDA graphs on the CPU: it records operations with their tensors, and repeats them without Python."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["MIB", "RecordingBackend", "out_of_memory"]

MIB = 2**20

_FORBIDDEN = {
    "_local_scalar_dense",  # .item(), bool(), .tolist()
    "nonzero",
    "masked_select",
    "equal",
    "lift_fresh",  # a tensor from Python numbers, which CUDA would copy from ordinary memory
}


def out_of_memory():
    """Returns the error that torch raises when a GPU's memory is full."""
    return torch.OutOfMemoryError("CUDA out of memory.")


class RecordingBackend:
    """Implements `GraphBackend` with the rules of CUDA graphs.

    - A capture computes nothing: the tensors that it returns contain NaN until the first replay.
    - A capture that reads a tensor from Python, or copies a number to the device, fails.
    - A replay runs no Python code of the module, and reads and writes the same memory as the capture.
    - Graphs share memory: a replay destroys the results of all others.
    - Only the thread that called `start` may use it.

    Args:
        free: Free bytes at the start.
        graph_bytes: Bytes that a graph of one row needs; graphs share their memory, so the largest one counts.
    """

    def __init__(self, *, free=1024 * MIB, graph_bytes=MIB):
        self.device = torch.device("cpu")
        self.counts = Counter()
        """How often each method was called."""
        self.faults = defaultdict(list)
        """Errors to raise at the next uses of "warming_up", "capture", "replay" or "synchronize"; None raises none."""
        self.wrong = False
        """Whether replays give wrong answers."""
        self.graphs = []
        """Graphs that are not reset."""
        self._free = free
        self._graph_bytes = graph_bytes
        self._pool = 0
        self._thread = None

    def start(self):
        self._thread = threading.get_ident()

    def stage(self, tensor):
        self.use("stage")
        return tensor.clone()

    @contextlib.contextmanager
    def warming_up(self):
        self.use("warming_up")
        yield

    def capture(self, compute):
        self.use("capture")
        graph = _RecordedGraph(self)
        with graph:
            output = compute()
        graph.destroy_results()
        rows = next(leaf.shape[0] for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        self._pool = max(self._pool, rows * self._graph_bytes)
        self.graphs.append(graph)
        return graph, output

    def synchronize(self):
        self.use("synchronize")

    def free_bytes(self):
        self.use("free_bytes")
        return self._free - self._pool

    def release(self):
        self.use("release")
        assert not self.graphs, "graphs still use the memory"
        self._pool = 0

    def use(self, method):
        """Counts a call, and raises the error that is due."""
        assert threading.get_ident() == self._thread, "graphs belong to one thread"
        self.counts[method] += 1
        error = self.faults[method].pop(0) if self.faults[method] else None
        if error is not None:
            raise error


class _RecordedGraph(TorchDispatchMode):
    """Records operations while it is active."""

    def __init__(self, backend):
        super().__init__()
        self._backend = backend
        self._operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name.removeprefix("aten::") in _FORBIDDEN:
            raise torch.AcceleratorError(f"CUDA error: operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in _tensors((args, kwargs))}
        # Views and results in place share the memory of an argument, and need no copy.
        new = [None if id(each.untyped_storage()) in given else each for each in _tensors(result)]
        self._operations.append((func, args, kwargs or {}, new))
        return result

    def destroy_results(self):
        """Fills all memory that the graph allocated with NaN or zeros."""
        for *_, results in self._operations:
            for result in results:
                if result is not None:
                    result.fill_(float("nan") if result.is_floating_point() else 0)

    def replay(self):
        self._backend.use("replay")
        assert self in self._backend.graphs, "the graph is reset"
        for graph in self._backend.graphs:
            if graph is not self:
                graph.destroy_results()
        for func, args, kwargs, results in self._operations:
            for old, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)
        if self._backend.wrong:
            next(each for *_, results in reversed(self._operations) for each in results if each is not None).add_(1)

    def reset(self):
        self.destroy_results()
        self._backend.graphs.remove(self)


def _tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
