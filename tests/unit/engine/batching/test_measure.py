"""What is found out at load refuses what must not be batched, and stops where batching does not pay."""

import math
import types

import accelerate.hooks
import diffusers
import pytest
import torch
from structlog.testing import capture_logs

from benchmarks.sizing.fleet import parse_step_ms
from calotype_server.engine.batching import measure
from calotype_server.engine.batching.measure import Threads, knee, unbatchable, verify
from support.engine import tiny
from support.engine.batching import Denoiser, sample


def calls(*values):
    """Arguments of the tiny denoiser's calls."""
    return [((sample(value), torch.tensor(number)), {}) for number, value in enumerate(values)]


class Coupled(torch.nn.Module):
    """Subtracts the batch's mean: what one request gets depends on the others."""

    def forward(self, sample, timestep):
        return (sample - 0.001 * sample.mean(0, keepdim=True),)


class Companionable(torch.nn.Module):
    """Right to seven digits, but not to the last bit: whoever is first in the batch decides it."""

    def forward(self, sample, timestep):
        return (sample * (1 + 1e-7 * (sample[0, 0] > 1)),)


class Broken(torch.nn.Module):
    """Takes one row only."""

    def forward(self, sample, timestep):
        return (sample.reshape(1, 4),)


class Aggregating(torch.nn.Module):
    """Has one answer for a whole batch."""

    def forward(self, sample, timestep):
        return (sample.sum(),)


class Invalid(torch.nn.Module):
    """Is NaN for batches."""

    def forward(self, sample, timestep):
        return (sample if len(sample) == 1 else sample * float("nan"),)


class TestVerify:
    """Joined answers must be the single ones."""

    def test_rows_that_stand_alone_pass(self):
        """Nothing is said about a model whose rows do not touch."""
        assert verify(Denoiser(), calls(1, 2, 3)) is None
        assert verify(Denoiser(), calls(1, 2, 3), deterministic_rows=8) is None

    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            (Coupled(), "differ by"),
            (Aggregating(), "differ by"),
            (Invalid(), "differ by nan"),
            (Broken(), "RuntimeError"),
        ],
    )
    def test_coupled_rows_are_refused(self, module, reason):
        """A request that would get another picture for its company is not batched, with a reason for the operator."""
        assert reason in verify(module, calls(1, 2, 3))

    def test_last_bits_count_where_asked_for(self):
        """Within the tolerance is not enough for a deterministic server."""
        assert verify(Companionable(), calls(1, 2)) is None
        assert "last bits" in verify(Companionable(), calls(1, 2), deterministic_rows=4)

    def test_calls_of_different_kinds_are_not_enough(self):
        """With nothing to join there is nothing to be sure of."""
        different = [((sample(1, 1, 4), torch.tensor(0)), {}), ((sample(1, 1, 6), torch.tensor(0)), {})]
        assert "nothing in common" in verify(Denoiser(), different)

    def test_tolerance_is_the_dtypes(self):
        """Half precision rounds more coarsely, so more is allowed."""

        class Rounding(torch.nn.Module):
            def forward(self, sample, timestep):
                return (sample * (1.01 if len(sample) > 1 else 1.0),)

        half = [((sample(value).bfloat16(), torch.tensor(0)), {}) for value in (1, 2)]
        assert verify(Rounding(), half) is None
        assert "differ" in verify(Rounding(), calls(1, 2))


class TestKnee:
    """More requests a call, while that raises the throughput."""

    @pytest.fixture
    def costs(self, monkeypatch):
        """Sets the seconds that a call with so many rows takes, and what is lost by handing half of them out."""

        def set_costs(cost, handing_out=math.inf):
            def seconds(threads, module, args, kwargs):
                whole = cost((args or (*kwargs.values(),))[0].shape[0])
                return whole if threads == 1 else whole / 2 + handing_out

            monkeypatch.setattr(measure, "_seconds", seconds)

        return set_costs

    @pytest.mark.parametrize(
        ("cost", "rows"),
        [
            (lambda _: 1.0, 16),  # all overhead
            (lambda rows: 0.1 * rows, 1),  # all computation
            (lambda rows: 1.0 + 0.1 * rows, 16),
            (lambda rows: 1.0 + 1.5 * rows, 8),  # 16 rows would be 4 % quicker than twice 8
        ],
    )
    def test_stops_where_it_no_longer_pays(self, costs, cost, rows):
        """A further doubling must gain a twentieth."""
        costs(cost)
        assert knee(Denoiser(), calls(1)[0], threads=(1, 2)) == (rows, Threads(1, 2, math.inf))

    @pytest.mark.parametrize(
        ("handing_out", "from_rows"),
        [
            (1.0, 2),  # 3.0 s by one thread, 2.5 s by two
            (3.0, 8),
            (7.0, 16),
            (8.0, math.inf),  # 3 % are not worth it
        ],
    )
    def test_many_rows_are_worth_more_threads(self, costs, handing_out, from_rows):
        """The fewest rows from which more threads are quicker by a twentieth; a single request was tried before."""
        costs(lambda rows: 1.0 + rows, handing_out)
        assert knee(Denoiser(), calls(1)[0], threads=(1, 2)) == (16, Threads(1, 2, from_rows))

    def test_what_was_measured_is_logged_as_the_simulation_takes_it(self, costs):
        """Milliseconds of a call by its rows: for `make sizing`."""
        costs(lambda rows: 0.1 + 0.01 * rows)
        with capture_logs() as logs:
            knee(Denoiser(), calls(1)[0], threads=(1, 1), most=4)
        (line,) = (each for each in logs if each["event"] == "knee")
        assert line["step_ms"] == "1:110,2:120,4:140"
        assert parse_step_ms(line["step_ms"]) == ((1, 0.11), (2, 0.12), (4, 0.14))

    def test_threads_are_as_before(self):
        """What was tried is not left behind."""
        before = torch.get_num_threads()
        knee(Denoiser(), calls(1)[0], threads=(before, before + 1), most=2)
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize(("most", "rows"), [(1, 1), (6, 6), (100, 16)])
    def test_tries_no_more_than_there_may_be(self, costs, most, rows):
        """A server for six does not make its operator wait for more, and has a batch for all six."""
        costs(lambda _: 1.0)
        assert knee(Denoiser(), calls(1)[0], threads=(1, 1), most=most).rows == rows

    def test_counts_rows_not_requests(self, costs):
        """With guidance a request has two rows."""
        costs(lambda _: 1.0)
        assert knee(Denoiser(), ((sample(1, 2), torch.tensor(0)), {}), threads=(1, 1), most=4).rows == 8

    def test_stops_where_memory_ends(self):
        """What does not fit does not pay."""

        def act(rows):
            if len(rows) > 2:
                raise torch.OutOfMemoryError

        assert knee(Denoiser(act), calls(1)[0], threads=(1, 1)).rows <= 2

    def test_a_call_that_fails_alone_is_told(self):
        """That is no question of how many."""
        with pytest.raises(ZeroDivisionError):
            knee(Denoiser(lambda _: 1 / 0), calls(1)[0], threads=(1, 1))


class TestUnbatchable:
    """Models that keep something from step to step cannot be shared, and it is said why."""

    def test_plain_modules_can(self):
        """Nothing stands against an ordinary module."""
        assert unbatchable(tiny.shared("flux").transformer) is None

    def test_caches(self):
        """The caches of diffusers keep residuals on the module."""
        module = tiny.build("flux").transformer
        module.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        assert "cache" in unbatchable(module)
        module.disable_cache()
        assert unbatchable(module) is None

    def test_stateful_hooks(self):
        """A cache put on by hand is found as well."""
        module = tiny.build("flux").transformer
        diffusers.hooks.apply_first_block_cache(module, diffusers.FirstBlockCacheConfig(threshold=0.1))
        assert "hook" in unbatchable(module)

    def test_offloading(self):
        """Accelerate's hooks move weights under the others' feet, on any part of the model."""
        module = tiny.build("sd15").unet
        accelerate.hooks.add_hook_to_module(module.mid_block, accelerate.hooks.ModelHook())
        assert "Accelerate" in unbatchable(module)

    def test_several_processes(self):
        """Context parallelism."""
        module = Denoiser()
        module._parallel_config = types.SimpleNamespace()
        assert "processes" in unbatchable(module)
