"""Timing measurements at load: how many rows pay off, and how many threads."""

from __future__ import annotations

import math

import pytest
import torch
from structlog.testing import capture_logs

from benchmarks.sizing.fleet import parse_step_ms
from calotype_server.engine.batching import measure
from calotype_server.engine.batching.measure import Threads, knee
from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.runtime.eager import EagerRuntime
from support.engine import tiny
from support.engine.batching import Denoiser, sample
from support.engine.device_errors import EXHAUSTED


def call(rows=1):
    """Returns arguments for a call of the test denoiser."""
    return (sample(1, rows), torch.tensor(0)), {}


def pick(pipeline):
    """Returns the number of threads that is picked for a pipeline."""
    return measure.pick_threads(pipeline, describe("x", pipeline, Defaults()), EagerRuntime(pipeline.unet))


@pytest.fixture
def four_threads():
    """Lets torch use four threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class TestPickThreads:
    """One thread or all of them, whichever makes a single call faster."""

    @pytest.mark.parametrize(("single", "expected"), [(0.5, 1), (2.0, 4)])
    def test_the_faster_number_is_picked(self, monkeypatch, four_threads, single, expected):
        """The result is one if one thread is faster, otherwise torch's default; torch's setting is restored."""
        pipeline = tiny.shared("sd15")
        monkeypatch.setattr(measure, "_fastest", lambda _: single * 0.1 if torch.get_num_threads() == 1 else 0.1)
        assert pick(pipeline) == expected
        assert torch.get_num_threads() == 4

    def test_a_slow_denoiser_is_measured_once(self, monkeypatch, four_threads):
        """If a call takes over half a second, one thread is not tried."""
        pipeline = tiny.shared("sd15")
        measured = []
        monkeypatch.setattr(measure, "_fastest", lambda _: measured.append(1) or 0.6)
        assert pick(pipeline) == 4
        assert len(measured) == 1


class TestKnee:
    """More requests share a call as long as that raises throughput."""

    @pytest.fixture
    def costs(self, monkeypatch):
        """Sets the seconds that a call with this many rows takes, and the overhead of a second thread."""

        def set_costs(cost, overhead=math.inf):
            def seconds(threads, runtime, calls):
                whole = cost(sum(each.rows for each in calls))
                return whole if threads == 1 else whole / 2 + overhead

            monkeypatch.setattr(measure, "_seconds", seconds)

        return set_costs

    @pytest.mark.parametrize(
        ("cost", "rows"),
        [
            (lambda _: 1.0, 16),  # Constant: all overhead.
            (lambda rows: 0.1 * rows, 1),  # Proportional: all computation.
            (lambda rows: 1.0 + 0.1 * rows, 16),
            (lambda rows: 1.0 + 1.5 * rows, 8),  # 16 rows would be 4 % faster than twice 8.
        ],
    )
    def test_more_rows_must_raise_throughput_by_a_twentieth(self, costs, cost, rows):
        """The result is the smallest number of rows whose throughput is within 5 % of the best."""
        costs(cost)
        assert knee(EagerRuntime(Denoiser()), call(), threads=(1, 2)) == (rows, Threads(1, 2, math.inf))

    @pytest.mark.parametrize(
        ("overhead", "from_rows"),
        [
            (1.0, 2),  # 3.0 s with one thread, 2.5 s with two.
            (3.0, 8),
            (7.0, 16),
            (8.0, math.inf),  # 3 % are not enough.
        ],
    )
    def test_many_rows_use_more_threads(self, costs, overhead, from_rows):
        """`from_rows` is the smallest number of rows from which more threads are faster by a twentieth."""
        costs(lambda rows: 1.0 + rows, overhead)
        assert knee(EagerRuntime(Denoiser()), call(), threads=(1, 2)) == (16, Threads(1, 2, from_rows))

    def test_measurements_are_logged_in_the_format_of_make_sizing(self, costs):
        """The log line has the milliseconds of a call by its rows, and the simulation can read it."""
        costs(lambda rows: 0.1 + 0.01 * rows)
        with capture_logs() as logs:
            knee(EagerRuntime(Denoiser()), call(), threads=(1, 1), max_requests=4)
        (line,) = (each for each in logs if each["event"] == "knee")
        assert line["step_ms"] == "1:110,2:120,4:140"
        assert parse_step_ms(line["step_ms"]) == ((1, 0.11), (2, 0.12), (4, 0.14))

    def test_the_number_of_threads_is_restored(self):
        """Torch uses as many threads after the measurement as before."""
        before = torch.get_num_threads()
        knee(EagerRuntime(Denoiser()), call(), threads=(before, before + 1), max_requests=2)
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize(("max_requests", "rows"), [(1, 1), (6, 6), (100, 16)])
    def test_at_most_max_requests_are_tried(self, costs, max_requests, rows):
        """A server for six requests measures at most six, and no server measures more than sixteen."""
        costs(lambda _: 1.0)
        assert knee(EagerRuntime(Denoiser()), call(), threads=(1, 1), max_requests=max_requests).rows == rows

    def test_rows_are_counted_not_requests(self, costs):
        """With classifier-free guidance each request has two rows."""
        costs(lambda _: 1.0)
        assert knee(EagerRuntime(Denoiser()), call(rows=2), threads=(1, 1), max_requests=4).rows == 8

    def test_exhausted_memory_ends_the_measurement(self):
        """The result has only rows that fit into memory."""

        def act(rows):
            if len(rows) > 2:
                raise torch.OutOfMemoryError

        assert knee(EagerRuntime(Denoiser(act)), call(), threads=(1, 1)).rows <= 2

    def test_a_call_that_fails_alone_raises(self):
        """An exception of a single call is raised, because the number of rows is not its cause."""
        with pytest.raises(ZeroDivisionError):
            knee(EagerRuntime(Denoiser(lambda _: 1 / 0)), call(), threads=(1, 1))

    def test_a_device_that_failed_is_not_a_number_of_rows(self):
        """If the device fails at some number of rows, that is raised: no later call can succeed."""

        def act(rows):
            if len(rows) > 1:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            knee(EagerRuntime(Denoiser(act)), call(), threads=(1, 1))

    @pytest.mark.parametrize("fault", EXHAUSTED, ids=str)
    def test_exhausted_memory_in_a_library_ends_the_measurement(self, fault):
        """Memory that a library of the device cannot get limits the rows, whatever the exception is."""

        def act(rows):
            if len(rows) > 1:
                raise fault

        assert knee(EagerRuntime(Denoiser(act)), call(), threads=(1, 1)).rows <= 2

    def test_the_device_of_the_model_is_measured(self, monkeypatch):
        """A call ends when the model's own device has computed it, not the first device of the machine."""
        waited = []
        monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
        monkeypatch.setattr(measure, "device_of", lambda _: torch.device("cuda", 1))
        knee(EagerRuntime(Denoiser()), call(), threads=(1, 1), max_requests=1)
        assert set(waited) == {torch.device("cuda", 1)}
