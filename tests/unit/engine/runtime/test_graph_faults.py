"""A graph that cannot be captured or replayed costs time, and no request."""

import itertools

import pytest
import torch

from calotype_server.engine.runtime import graphs
from support.engine.batching import Denoiser, answer_to
from support.engine.graph_backend import RecordingBackend, out_of_memory
from support.engine.graph_runtime import Runtime, events

LOST = "CUDA error: an illegal memory access was encountered"


def failed(logs):
    """Returns of every failed graph whether graphs are off since then."""
    return [entry["graphs_off"] for entry in logs if entry["event"] == "a graph failed"]


def ready(**options):
    """Returns a runtime with a graph for one row."""
    runtime = Runtime(**options)
    runtime.call()
    runtime.call()
    assert runtime.graph_count == 1
    return runtime


class Reading(Denoiser):
    """Reads a value back from the device, as a graph cannot."""

    def forward(self, sample, timestep, return_dict=True):
        return super().forward(sample, torch.tensor(timestep.max().item()))


class Counting(Denoiser):
    """Its answer depends on the number of its calls, which a graph cannot repeat."""

    def forward(self, sample, timestep, return_dict=True):
        return super().forward(sample, timestep + len(self.sizes))


class TestCapture:
    """A failed capture is not repeated."""

    def test_a_call_that_waits_for_the_device(self, logs):
        """It is noticed before a capture, which it would make invalid, and one line says so. All answers are right."""
        runtime = Runtime(Reading())
        for width in (4, 5, 6):
            assert all(runtime.right(number, 1.0, 1, width) for number in range(4))
        assert runtime.backend.counts["capture"] == 0
        assert events(logs) == ["no graph for some calls"]

    def test_two_failures_turn_graphs_off(self, logs):
        """Each size is tried once; after two failures graphs are off. All answers are right."""
        runtime = Runtime()
        runtime.backend.faults["capture"] = [torch.AcceleratorError("CUDA error: not permitted"), RuntimeError()]
        for width in (4, 5, 6):
            assert all(runtime.right(number, 1.0, 1, width) for number in range(4))
        assert runtime.backend.counts["capture"] == 2
        assert failed(logs) == [False, True]
        assert runtime.backend.counts["release"] == 2

    def test_a_wrong_answer_turns_graphs_off(self, logs):
        """A graph that repeats what must change is found before anyone gets its answer."""
        runtime = Runtime(Counting())
        answers = [runtime.call(1, 0.0)[0, 0] for _ in range(4)]
        assert answers == [2, 8, 9, 10]  # 2 plus the number of earlier calls; five calls belong to the capture
        assert failed(logs) == [True]
        assert "WrongAnswer" in logs[-1]["error"]
        assert runtime.graph_count == len(runtime.backend.graphs) == 0

    def test_a_device_that_computes_wrongly_turns_graphs_off(self, logs):
        """If replays are wrong, all calls run eagerly."""
        backend = RecordingBackend()
        backend.wrong = True
        runtime = Runtime(backend=backend)
        assert all(runtime.right(number, 1.0, 1, width) for width in (4, 5) for number in range(3))
        assert backend.counts["capture"] == 1
        assert failed(logs) == [True]

    @pytest.mark.parametrize(("exact", "accepted"), [(False, 1), (True, 0)])
    def test_exact_allows_no_rounding(self, exact, accepted):
        """An error of one bit is accepted, but not on a deterministic server."""

        class Rounding(Denoiser):
            def forward(self, sample, timestep, return_dict=True):
                return (super().forward(sample, timestep)[0] + 1e-6 * len(self.sizes),)

        runtime = Runtime(Rounding(), exact=exact)
        for _ in range(3):
            runtime.call()
        assert runtime.graph_count == accepted

    def test_a_request_that_fails_by_itself_is_no_failed_capture(self, logs):
        """An error of the denoiser reaches its request, however often, and graphs stay on for the others."""

        def act(rows):
            if poisoned:
                raise ValueError("poisoned")

        runtime, poisoned = Runtime(Denoiser(act)), False
        runtime.call()
        poisoned = True
        for _ in range(3):
            with pytest.raises(ValueError, match="poisoned"):
                runtime.call()
        poisoned = False
        assert all(runtime.right(number) for number in range(3))
        assert runtime.graph_count == 1
        assert events(logs) == []

    def test_nan_of_a_request_is_no_wrong_answer(self):
        """A request with NaN does not prevent a graph, and its NaN stays in its rows."""
        runtime = Runtime()
        assert runtime.call(float("nan")).isnan().all()
        assert runtime.call(float("nan")).isnan().all()
        assert runtime.graph_count == 1
        assert runtime.call(float("nan")).isnan().all()
        assert runtime.right(3, 1.0)

    def test_nan_of_the_model_prevents_a_graph(self, logs):
        """An answer that is always NaN cannot be checked: the size runs eagerly, and one line says so."""

        class Broken(Denoiser):
            def forward(self, sample, timestep, return_dict=True):
                return (sample * float("nan"),)

        runtime = Runtime(Broken())
        assert all(runtime.call().isnan().all() for _ in range(6))
        assert runtime.backend.counts["capture"] == 1
        assert events(logs) == ["no graph for some calls"]

    @pytest.mark.parametrize(
        ("module", "arguments", "reason"),
        [
            ("scaled", {"scale": 0.5}, "The argument 'scale' contains a float"),
            ("opaque", {}, "Its answer contains objects"),
        ],
    )
    def test_a_refused_call_is_logged_once(self, module, arguments, reason, logs):
        """Calls that no graph can compute run eagerly, with one line for each reason."""

        class Opaque:
            def __init__(self, sample):
                self.sample = sample

        class Scaled(Denoiser):
            def forward(self, sample, timestep, return_dict=True, scale=1):
                return (sample * scale,) if module == "scaled" else (sample, Opaque(sample))

        runtime = Runtime(Scaled())
        for _ in range(5):
            runtime.call(**arguments)
        assert runtime.graph_count == 0
        [entry] = [each for each in logs if each["log_level"] == "warning"]
        assert reason in entry["reason"]


class TestMemory:
    """Graphs are the first to go when memory is scarce."""

    @pytest.mark.parametrize("place", ["warming_up", "capture"])
    def test_memory_runs_out_in_a_capture(self, place, logs):
        """All graphs are dropped, the call is answered eagerly, and its size gets no graph."""
        runtime = ready()
        runtime.backend.faults[place] = [out_of_memory()]
        assert all(runtime.right(number, 1.0, 4) for number in range(4))
        assert runtime.graph_count == len(runtime.backend.graphs) == 0
        assert runtime.backend.counts["release"] == 1
        assert failed(logs) == []
        assert len(events(logs)) == 2

    def test_memory_runs_out_at_a_replay(self):
        """The error reaches the batcher, which frees memory and tries again."""
        runtime = ready()
        runtime.backend.faults["replay"] = [out_of_memory()]
        with pytest.raises(torch.OutOfMemoryError):
            runtime.call()
        assert runtime.free_memory()
        assert runtime.right()

    def test_freed_graphs_return_late(self, monkeypatch):
        """After memory ran out, a size must recur much more often before it is captured again."""
        monkeypatch.setattr(graphs, "_SIGHTINGS_AFTER_OUT_OF_MEMORY", 10)
        runtime = ready()
        assert runtime.free_memory()
        assert not runtime.free_memory()
        counts = []
        for _ in range(12):
            assert runtime.right()
            counts.append(runtime.graph_count)
        assert counts == [0] * 8 + [1] * 4

    def test_everything_of_a_dropped_graph_is_freed(self):
        """The shared memory is released with the last graph, and not before."""
        runtime = ready()
        runtime.call(width=5)
        runtime.call(width=5)
        runtime._drop(next(iter(runtime._graphs)))
        assert runtime.backend.counts["release"] == 0
        runtime.free_memory()
        assert runtime.backend.counts["release"] == 1


class TestReplay:
    """A graph that fails to replay is dropped."""

    def test_the_call_is_answered_eagerly(self, logs):
        """The size runs eagerly from then on; after a second failure all do."""
        runtime = ready()
        runtime.backend.faults["replay"] = [RuntimeError("the graph is invalid")]
        assert all(runtime.right(number) for number in range(4))
        assert runtime.graph_count == 0
        runtime.call(width=5)
        runtime.call(width=5)
        assert runtime.graph_count == 1
        runtime.backend.faults["replay"] = [RuntimeError("the graph is invalid")]
        assert all(runtime.right(number, 1.0, 1, width) for width in (5, 6) for number in range(4))
        assert runtime.graph_count == 0
        assert failed(logs) == [False, True]

    def test_an_error_of_the_graph_alone_leaves_the_device(self, logs):
        """`AcceleratorError` is no lost device if the device still answers."""
        runtime = ready()
        runtime.backend.faults["replay"] = [torch.AcceleratorError("CUDA error: invalid argument")]
        assert runtime.right()
        assert failed(logs) == [False]


@pytest.mark.parametrize("place", ["warming_up", "capture", "replay", "free_bytes"])
def test_a_lost_device_is_raised(place, logs):
    """If the device answers with an error after a failure, that error is raised, and no eager call is tried."""
    runtime = Runtime() if place != "replay" else ready()
    runtime.call()
    calls = len(runtime.module.sizes)
    runtime.backend.faults[place] = [torch.AcceleratorError(LOST)]
    runtime.backend.faults["synchronize"] = [torch.AcceleratorError(LOST)]
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        runtime.call()
    assert len(runtime.module.sizes) - calls in (0, 3, 4)
    assert failed(logs) == []


def test_a_device_that_is_lost_while_the_model_loads_is_raised():
    """It is no reason to run eagerly."""
    runtime = Runtime(loading=True)
    runtime.backend.faults["capture"] = [torch.AcceleratorError(LOST)]
    runtime.backend.faults["synchronize"] = [*itertools.repeat(None, 6), torch.AcceleratorError(LOST)]
    with pytest.raises(torch.AcceleratorError):
        runtime.call()


def test_answers_after_a_failure_are_right():
    """An answer that was kept before all graphs were dropped is still there."""
    runtime = ready()
    kept = runtime.call(5, 1.0)
    runtime.free_memory()
    assert torch.equal(kept, answer_to(5, 1))
