"""A failed capture of a CUDA graph, with a stand-in for torch's functions, gives back everything that it has taken."""

import contextlib

import pytest
import torch

from calotype_server.engine.runtime.graph_backend import CudaBackend

DEVICE = torch.device("cuda", 1)


class Allocator:
    """Counts captures and pools as torch's allocator does; its graphs behave as those of `CUDAGraph.cpp`."""

    def __init__(self, monkeypatch):
        self.underway = []
        self.users = {}
        self.valid = True
        """Whether captures can be ended: a call that waits for the device makes them invalid."""
        self.begins = True
        """Whether captures can begin."""
        self._pools = 0
        allocator = self

        class Graph:
            ended = False

            def capture_begin(self, pool, capture_error_mode):
                assert capture_error_mode == "thread_local"
                self._pool = pool
                allocator.underway.append(pool)
                allocator.users[pool] = allocator.users.get(pool, 0) + 1
                if not allocator.begins:
                    raise torch.AcceleratorError("CUDA error: invalid argument")

            def capture_end(self):
                if not allocator.valid:
                    raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
                allocator.underway.remove(self._pool)
                self.ended = True

            def pool(self):
                if not self.ended:
                    raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
                return self._pool

            def reset(self):
                if self.ended:
                    allocator.release(1, self._pool)
                self.ended = False

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self.new_pool)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def new_pool(self):
        self._pools += 1
        return (0, self._pools)

    def end(self, device, pool):
        assert device == DEVICE.index
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device, pool):
        assert device == DEVICE.index
        self.users[pool] -= 1
        assert self.users[pool] >= 0


@pytest.fixture
def allocator(monkeypatch):
    """The stand-in."""
    return Allocator(monkeypatch)


@pytest.fixture
def backend(allocator, monkeypatch):
    """A backend whose captures need a stream, but no GPU."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: object())
    made = CudaBackend(DEVICE)
    made.start()
    return made


def fail():
    """A call that fails."""
    raise ZeroDivisionError


@pytest.mark.parametrize("kept", [False, True], ids=["first", "after another"])
@pytest.mark.parametrize(
    ("begins", "valid", "compute"),
    [(True, True, fail), (True, False, fail), (True, False, int), (False, True, int)],
    ids=["the call fails", "the call makes it invalid", "it is invalid at its end", "it cannot begin"],
)
def test_a_failed_capture_is_not_underway(allocator, backend, begins, valid, compute, kept):
    """The allocator can release memory again, the failed graph uses no pool, and the next capture succeeds."""
    graphs = [backend.capture(int)[0]] if kept else []
    allocator.begins, allocator.valid = begins, valid
    with pytest.raises(ZeroDivisionError if compute is fail else torch.AcceleratorError):
        backend.capture(compute)
    assert allocator.underway == []
    assert sum(allocator.users.values()) == len(graphs)
    allocator.begins = allocator.valid = True
    graphs.append(backend.capture(int)[0])
    assert sum(allocator.users.values()) == len(graphs)
    for graph in graphs:
        graph.reset()
    assert set(allocator.users.values()) == {0}


def test_an_unknown_version_of_torch_keeps_the_error(allocator, backend, monkeypatch):
    """Without torch's internal functions, the error of the capture is still the one that is raised."""
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    allocator.valid = False
    with pytest.raises(ZeroDivisionError):
        backend.capture(fail)
