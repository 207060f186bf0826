"""Graphs answer as the plain call does, and every call that has none runs eagerly."""

import pytest
import torch

from calotype_server.engine.runtime import graphs
from calotype_server.engine.runtime.graphs import GraphsRuntime, row_buckets
from calotype_server.engine.runtime.launch import Launch
from support.engine.batching import Denoiser, answer_to, sample
from support.engine.graph_backend import MIB, RecordingBackend
from support.engine.graph_runtime import Runtime, events

CALLS_OF_A_CAPTURE = 5
"""Three to warm up, one to capture, one to compare with."""


class TestReplay:
    """A size gets a graph when it recurs."""

    def test_the_second_call_is_captured_and_later_ones_replayed(self):
        """The module runs for the first call and in the capture, and never again; every answer is right."""
        runtime = Runtime()
        counts = []
        for number in range(5):
            assert runtime.right(number, float(number))
            counts.append(len(runtime.module.sizes))
        assert counts == [1, *[1 + CALLS_OF_A_CAPTURE] * 4]
        assert runtime.graph_count == 1

    def test_an_answer_is_never_overwritten(self):
        """Answers that are kept stay the same when the same graph and others are replayed."""
        runtime = Runtime()
        kept = [(runtime.call(number, 0.0, rows), number, rows) for number in range(6) for rows in (1, 2, 1)]
        assert runtime.graph_count == 2
        assert all(torch.equal(answer, answer_to(number, 0, rows)) for answer, number, rows in kept)

    @pytest.mark.parametrize("timestep", [3.5, torch.tensor(3.5), torch.tensor([3.5])])
    def test_every_form_of_a_timestep_shares_a_graph(self, timestep):
        """A timestep as a number becomes a tensor, so that it needs no graph of its own."""
        runtime = Runtime()
        runtime.call(timestep=7.5)
        runtime.call(timestep=7.5)
        before = len(runtime.module.sizes)
        call = runtime.collator.bind((sample(1),), {"timestep": timestep}, {})
        with torch.no_grad():
            assert runtime.run([call], 1)[0].tolist() == [[5.5] * 4]
        assert len(runtime.module.sizes) == before

    def test_requests_share_a_graph(self):
        """Rows of several requests are joined in the graph's memory, each with its own timestep."""
        runtime = Runtime(max_rows=4)
        for number in range(3):
            calls = [
                runtime.collator.bind((sample(value, rows),), {"timestep": torch.tensor(float(number * value))}, {})
                for value, rows in ((1, 1), (2, 3))
            ]
            with torch.no_grad():
                answers = runtime.collator.split(runtime.run(calls, 4), calls, 4)
            assert torch.equal(answers[0][0], answer_to(1, number))
            assert torch.equal(answers[1][0], answer_to(2, 2 * number, 3))
        assert runtime.graph_count == 1

    def test_sizes_have_their_own_graphs(self):
        """Different widths are never confused."""
        runtime = Runtime()
        for number in range(4):
            assert all(runtime.right(number, 1.0, 1, width) for width in (4, 5, 6))
        assert runtime.graph_count == 3


class TestLoading:
    """While the model loads, every call gets a graph."""

    def test_every_number_of_rows_at_once(self):
        """The first call with some number of rows is captured; later ones do not run the module."""
        runtime = Runtime(loading=True)
        assert all(runtime.right(rows, 1.0, rows) for rows in (8, 6, 4, 2))
        assert runtime.graph_count == 4
        before = len(runtime.module.sizes)
        assert all(runtime.right(rows, 2.0, rows) for rows in (2, 4, 6, 8))
        assert len(runtime.module.sizes) == before

    def test_graphs_of_measurements_are_dropped(self):
        """`clear` drops all graphs, and the next call gets a new one at once."""
        runtime = Runtime(loading=True)
        assert runtime.right(1, 1.0, 8)
        runtime.clear()
        assert runtime.graph_count == 0
        assert runtime.right(1, 1.0, 2)
        assert runtime.graph_count == 1

    def test_a_denoiser_that_fails_is_reported(self):
        """If the call raises, so does the runtime, and there is no graph."""

        def fail(_):
            raise ValueError

        runtime = Runtime(Denoiser(fail), loading=True)
        with pytest.raises(ValueError):
            runtime.call()
        assert runtime.graph_count == 0

    @pytest.mark.parametrize(("launch", "hints"), [(0.6, 1), (0.8, 0)])
    def test_little_gain_is_logged(self, launch, hints, logs, monkeypatch):
        """If launching takes less than 70 % of a step, the log says once that graphs gain little."""
        monkeypatch.setattr(graphs, "measure_launch", lambda *_: Launch(launch, 1.0))
        runtime = Runtime(loading=True)
        assert runtime.right(1, 1.0, 1)
        assert runtime.right(1, 1.0, 2)
        assert [entry["share"] for entry in logs if "share" in entry] == [0.6] * hints


class TestRows:
    """Rows are padded to a few numbers, so that few graphs serve all batches."""

    @pytest.mark.parametrize(
        ("most", "expected"),
        [(1, [1]), (2, [1, 2]), (7, [1, 2, 4, 6, 7]), (16, [1, 2, 4, 6, 8, 12, 16]), (20, [1, 2, 4, 6, 8, 12, 16, 20])],
    )
    def test_buckets(self, most, expected):
        """They grow by at most a half, and end with the most rows."""
        assert row_buckets(most) == expected

    def test_padding_is_cut_off(self):
        """Five rows are computed as six, and five are returned."""
        runtime = Runtime()
        assert all(runtime.right(number, 1.0, 5) for number in range(3))
        assert runtime.module.sizes == [5, *[6] * CALLS_OF_A_CAPTURE]
        assert runtime.call(1, 1.0, 6).shape[0] == 6
        assert runtime.graph_count == 1

    def test_more_rows_than_usual_run_eagerly(self):
        """A call with more rows than the most gets no graph."""
        runtime = Runtime(max_rows=2)
        assert all(runtime.right(number, 1.0, 3) for number in range(3))
        assert runtime.module.sizes == [3, 3, 3]

    def test_exact_adds_no_rows(self):
        """With `exact`, the number of rows is the batcher's decision, also when memory has lowered it."""
        runtime = Runtime(exact=True)
        assert all(runtime.right(number, 1.0, 3) for number in range(3))
        assert set(runtime.module.sizes) == {3}
        assert runtime.graph_count == 1


class TestBounds:
    """Graphs and their memory are limited."""

    def test_the_least_recently_used_graph_goes(self, monkeypatch):
        """With room for two graphs, the third replaces the one that was not used for the longest time."""
        monkeypatch.setattr(graphs, "_MAX_GRAPHS", 2)
        runtime = Runtime()
        for width in (4, 5, 4, 5, 4, 6, 6):
            assert runtime.right(1, 1.0, 1, width)
        assert runtime.graph_count == len(runtime.backend.graphs) == 2
        before = len(runtime.module.sizes)
        assert runtime.right(2, 1.0, 1, 4)
        assert runtime.right(2, 1.0, 1, 6)
        assert len(runtime.module.sizes) == before
        assert runtime.right(2, 1.0, 1, 5)
        assert len(runtime.module.sizes) > before

    def test_memory_is_measured(self, logs):
        """A graph that needs more memory than allowed is dropped with the others, which come back; it does not."""
        runtime = Runtime(backend=RecordingBackend(graph_bytes=MIB), budget_bytes=3 * MIB)
        for _ in range(3):
            assert runtime.right(1, 1.0, 2)
        assert runtime.graph_count == 1
        for _ in range(4):
            assert runtime.right(1, 1.0, 4)
        assert runtime.graph_count == 0
        assert runtime.backend.counts["release"] == 1
        for _ in range(3):
            assert runtime.right(1, 1.0, 2)
        assert runtime.graph_count == 1
        captures = runtime.backend.counts["capture"]
        for _ in range(5):
            assert runtime.right(1, 1.0, 4)
        assert runtime.backend.counts["capture"] == captures
        assert events(logs) == ["no graph for some calls"]

    def test_the_default_limit_is_a_share_of_the_free_memory(self):
        """By default, graphs use at most a quarter of the memory that is free at the start."""
        for free, expected in ((17, 1), (15, 0)):
            runtime = Runtime(backend=RecordingBackend(free=free * MIB, graph_bytes=MIB))
            for _ in range(3):
                assert runtime.right(1, 1.0, 4)
            assert runtime.graph_count == expected

    def test_keys_are_forgotten(self, monkeypatch):
        """Calls of ever new sizes do not fill memory with counters."""
        monkeypatch.setattr(graphs, "_MAX_KEYS", 3)
        runtime = Runtime()
        for width in range(1, 9):
            runtime.call(width=width)
        assert len(runtime._sightings._counts) == 3


class TestChanges:
    """Graphs of a module that has changed are dropped."""

    class Scaled(torch.nn.Module):
        """Multiplies by a weight."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0))
            self.eval()

        def forward(self, sample, timestep):
            return (sample * self.weight,)

    def test_invalidate_drops_all(self):
        """After a weight is replaced and `invalidate`, answers are computed with the new one, and a graph returns."""
        runtime = Runtime(self.Scaled())
        assert [runtime.call()[0, 0] for _ in range(3)] == [2, 2, 2]
        runtime.module.weight = torch.nn.Parameter(torch.tensor(3.0))
        runtime.invalidate()
        assert [runtime.call()[0, 0] for _ in range(3)] == [3, 3, 3]
        assert runtime.graph_count == len(runtime.backend.graphs) == 1

    def test_a_hook_ends_graphs(self, logs):
        """A module that no graph can compute any more runs eagerly after `invalidate`."""
        runtime = Runtime(self.Scaled())
        for _ in range(3):
            runtime.call()
        handle = runtime.module.register_forward_hook(lambda *_: (torch.zeros(1, 4),))
        runtime.invalidate()
        assert runtime.call().sum() == 0
        assert runtime.graph_count == 0
        handle.remove()
        runtime.invalidate()
        assert [runtime.call()[0, 0] for _ in range(3)] == [2, 2, 2]
        assert runtime.graph_count == 1
        assert events(logs) == ["no graph for some calls"]


def test_a_cpu_has_no_cuda_graphs():
    """Without a backend, the module must be on a CUDA device."""
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, not cpu"):
        GraphsRuntime(torch.nn.Linear(1, 1), exact=False, max_rows=1)
