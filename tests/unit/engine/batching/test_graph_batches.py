"""The device thread computes by graphs: families give the same images, and faults stay where they belong."""

import concurrent.futures
import functools
import itertools
import threading

import pytest
import torch

from calotype_server import errors
from calotype_server.engine.batching.batcher import StepBatcher
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.requests.shared_components import shared_components
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.runtime.device_thread import DeviceThread
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.runtime.graphs import GraphsRuntime
from calotype_server.engine.schedulers.make import make_scheduler
from support.engine import tiny, tiny_inputs
from support.engine.batching import Callers, answer_to, sample
from support.engine.graph_backend import RecordingBackend, out_of_memory
from support.runs import PATIENCE

REFUSED = {"chroma", "lumina2"}
LOST = "CUDA error: an illegal memory access was encountered"


def images(family, runtime, seeds=(1, 2)):
    """Returns the results of requests one after another through a batcher."""
    pipeline = tiny.shared(family)
    batcher = StepBatcher(runtime, max_rows=8)
    found = []
    for seed in seeds:
        with batcher.open_session() as session:
            scheduler = make_scheduler(pipeline, type(pipeline.scheduler).__name__)
            proxies = {denoiser_name(pipeline): session.proxy()}
            view = request_view(pipeline, scheduler, **shared_components(pipeline), **proxies)
            found.append(view(**tiny_inputs.arguments(family, seed=seed, steps=4))[0])
    batcher.close()
    return found


@pytest.mark.parametrize(
    "family",
    [
        name if name in tiny.REPRESENTATIVE | {"sd3", "qwen_image"} else pytest.param(name, marks=pytest.mark.slow)
        for name in tiny.FAMILIES
    ],
)
def test_images_equal_those_without_graphs(family):
    """Pipelines of every family give the same images bit for bit, from the first step to the last."""
    module = getattr(tiny.shared(family), denoiser_name(tiny.shared(family)))
    backend = RecordingBackend()
    # Padding would choose other kernels: one row per bucket.
    found = images(family, GraphsRuntime(module, exact=True, max_rows=8, backend=backend))
    expected = images(family, EagerRuntime(module, exact=True))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (backend.counts["replay"] > 0) == (family not in REFUSED)


class GraphCallers(Callers):
    """Calls a batcher whose runtime uses graphs."""

    def __init__(self, act=lambda _: None, **options):
        self.backend = RecordingBackend()
        self._widths = itertools.count(5)
        super().__init__(act, runtime=functools.partial(GraphsRuntime, max_rows=16, backend=self.backend), **options)
        self.runtime.end_loading()

    def plug(self):
        """Starts a call of a new width, which has no graph."""
        return self.start(self.call, 0, 0, 1, next(self._widths))

    def warm(self, *rows):
        """Makes calls until there is a graph for each of these numbers of rows."""
        for each in rows:
            for _ in range(2):
                self.call(0, 0, each)
        assert self.runtime.graph_count == len(rows)
        self.module.sizes.clear()


def right(futures):
    """Returns whether all calls have the answers to their numbers."""
    return all(torch.equal(future.result(0), answer_to(number, 0)) for number, future in enumerate(futures))


def test_users_share_a_graph():
    """Calls that wait together are one replay."""
    with GraphCallers() as callers:
        callers.warm(8)
        before = callers.backend.counts["replay"]
        plug = callers.together(*((number,) for number in range(8)))
        assert right(plug)
        assert callers.module.sizes == []
        assert callers.backend.counts["replay"] == before + 1


def test_graphs_are_dropped_before_rows():
    """If memory runs out beside graphs, they are dropped, the same batch is tried again, and its limit stays."""

    def act(rows):
        if len(rows) > 4 and callers.runtime.graph_count:
            raise out_of_memory()

    with GraphCallers(act) as callers:
        callers.warm(1, 2)
        assert right(callers.together(*((number,) for number in range(7))))
        assert callers.runtime.graph_count == 0
        assert callers.backend.counts["release"] == 1
        assert callers.batcher.max_rows == 16
        assert callers.module.sizes == [7, 7]


def test_rows_shrink_if_that_does_not_help():
    """If the batch still does not fit, it is halved as without graphs, and every request is answered."""

    def act(rows):
        if len(rows) > 4:
            raise out_of_memory()

    with GraphCallers(act) as callers:
        callers.warm(1)
        assert right(callers.together(*((number,) for number in range(8))))
        assert callers.runtime.graph_count == 0
        assert callers.batcher.max_rows == 4
        assert callers.module.sizes == [8, 8, 4, 4]


@pytest.mark.parametrize("place", ["warming_up", "capture", "replay"])
def test_memory_runs_out_in_any_place(place, logs):
    """During a capture or a replay with eight users, all are answered, and rows are not reduced."""
    with GraphCallers() as callers:
        callers.warm(1)
        for _ in range(2 if place == "replay" else 1):
            callers.together(*((number,) for number in range(8)))
        callers.backend.faults[place] = [out_of_memory()]
        assert right(callers.together(*((number,) for number in range(8))))
        assert callers.runtime.graph_count == 0
        assert callers.batcher.max_rows == 16
    assert "memory ran out: all graphs are dropped" in [entry["event"] for entry in logs]


def test_a_request_thread_can_free_the_graphs():
    """If memory runs out elsewhere, such as in a decoder, the device thread drops all graphs, also while it is idle."""
    freed = threading.Event()
    with GraphCallers() as callers:
        callers.warm(1, 2)
        release = callers.backend.release
        callers.backend.release = lambda: (release(), freed.set())
        callers.batcher.free_memory()
        assert freed.wait(PATIENCE)
        assert callers.runtime.graph_count == 0
        assert torch.equal(callers.call(1), answer_to(1, 0))


def test_memory_is_freed_without_losing_calls():
    """Calls that wait while memory is freed are answered."""
    with GraphCallers() as callers:
        callers.warm(1)
        futures = []
        with callers.held(3):
            futures = [callers.start(callers.call, number) for number in range(3)]
            callers.batcher.free_memory()
        concurrent.futures.wait(futures, PATIENCE)
        assert right(futures)


def test_a_full_device_is_no_lost_device():
    """Exhausted memory that torch reports as a failure of the accelerator makes batches smaller."""

    def act(rows):
        if len(rows) > 1:
            raise torch.AcceleratorError("DefaultCPUAllocator: can't allocate memory")

    with Callers(act) as callers:
        assert right(callers.together((0,), (1,)))
        assert callers.batcher.max_rows == 1


def test_a_lost_device_reaches_all():
    """If the device fails in a replay, all calls raise `EngineDead`, and none hangs."""
    with GraphCallers() as callers:
        callers.warm(1)
        callers.backend.faults["replay"] = [torch.AcceleratorError(LOST)]
        callers.backend.faults["synchronize"] = [torch.AcceleratorError(LOST)]
        for _ in range(2):
            with pytest.raises(errors.EngineDead):
                callers.call(1)


def test_a_failed_replay_fails_no_request(logs):
    """All users are answered by the plain call, and one line is logged."""
    with GraphCallers() as callers:
        callers.warm(8)
        callers.backend.faults["replay"] = [RuntimeError("the graph is invalid")]
        assert right(callers.together(*((number,) for number in range(8))))
        assert callers.module.sizes == [8]
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["a graph failed"]


def test_nan_stays_in_its_row():
    """NaN in one request does not reach the others through a graph, nor the next batch."""
    with GraphCallers() as callers:
        callers.warm(4)
        futures = callers.together((float("nan"),), (1,), (2,), (3,))
        assert futures[0].result(0).isnan().all()
        assert all(torch.equal(futures[number].result(0), answer_to(number, 0)) for number in (1, 2, 3))
        assert right(callers.together((0,), (1,), (2,), (3,)))
        assert callers.module.sizes == []


def test_the_batcher_uses_the_graphs_of_the_loading_model():
    """Graphs that were captured in the device thread before there was a batcher are replayed by the batcher."""
    backend, module, thread = RecordingBackend(), Callers().module, DeviceThread()
    runtime = GraphsRuntime(module, exact=False, max_rows=4, backend=backend)
    thread.call(runtime.start)
    call = runtime.collator.bind((sample(1, 2),), {"timestep": torch.tensor(1.0)}, {})
    for count in (2, 1):
        thread.call(functools.partial(runtime.run, [call] * count, 2 * count))
    thread.call(runtime.end_loading)
    batcher = StepBatcher(runtime, thread=thread, max_rows=4)
    with batcher.open_session() as session:
        assert torch.equal(session.proxy()(sample(3, 2), torch.tensor(1.0))[0], answer_to(3, 1, 2))
    batcher.close()
    assert backend.counts["capture"] == 2
