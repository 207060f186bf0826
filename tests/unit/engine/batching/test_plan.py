"""The batching plan that is made when a model is loaded."""

import math

import pytest
import torch

from calotype_server.engine.batching import plan as plan_module
from calotype_server.engine.batching.measure import Knee, Threads
from calotype_server.engine.batching.plan import Plan, PlanOptions, measure_plan
from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.runtime.eager import EagerRuntime
from support.engine import tiny


@pytest.fixture
def pipeline():
    """A pipeline that a test may change."""
    return tiny.build("sd15")


@pytest.fixture
def timings(monkeypatch):
    """Replaces the timing measurements by fixed results."""
    monkeypatch.setattr(plan_module, "pick_threads", lambda *_: 1)
    monkeypatch.setattr(plan_module, "knee", lambda *_, **__: Knee(8, Threads(1, 2, 4)))


def plan_of(pipeline, **options):
    """Returns the plan of a pipeline, for a server without `--max-active` by default."""
    options = PlanOptions(**{"max_active": None, **options})
    runtime = EagerRuntime(pipeline.unet, exact=options.deterministic)
    return measure_plan(pipeline, describe("tiny", pipeline, Defaults()), options, runtime)


def test_one_at_a_time_measures_nothing(pipeline):
    """With `--max-active 1` and a given number of threads the denoiser is not called."""
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    plan = plan_of(pipeline, max_active=1, threads=2)
    assert plan == Plan(1, 1, "The server was started with --max-active 1.", Threads(2, 2, math.inf))
    assert not calls


def test_a_deterministic_plan_uses_no_timing_measurement(pipeline, monkeypatch):
    """A deterministic server always has the same rows and threads, however busy the machine is."""
    for name in ("knee", "pick_threads"):
        monkeypatch.setattr(plan_module, name, lambda *_, **__: 1 / 0)
    plan = plan_of(pipeline, threads=2, deterministic=True)
    assert (plan.max_rows, plan.reason) == (8, "")
    assert plan.threads.of(1) == plan.threads.of(8) == 2


def test_memory_and_not_the_batch_limits_how_many_run(pipeline, timings):
    """Eight rows are four requests with guidance; eight requests run, so that all see a preview soon."""
    plan = plan_of(pipeline)
    assert plan == Plan(8, 8, "", Threads(1, 2, 4), request_rows=2)
    assert plan.max_joined == 4


def test_the_operators_limits_are_kept(pipeline, timings):
    """`--max-active` and `--max-batch-rows` replace the measured values."""
    plan = plan_of(pipeline, max_active=3, max_rows=6)
    assert (plan.max_active, plan.max_rows) == (3, 6)


def test_a_module_with_state_runs_alone(pipeline, timings):
    """A model with a cache between steps serves one request at a time."""
    pipeline.unet.is_cache_enabled = True
    plan = plan_of(pipeline, max_active=4)
    assert (plan.max_active, plan.max_rows, plan.provisional) == (1, 0, False)
    assert "cache" in plan.reason


def test_dependent_rows_take_turns(pipeline, timings):
    """If an answer depends on the other rows in a batch, requests take turns with one row each."""
    pipeline.unet.register_forward_hook(lambda _, __, output: (output[0] + output[0].mean(),))
    plan = plan_of(pipeline)
    assert (plan.max_active, plan.max_rows, plan.max_joined, plan.provisional) == (8, 1, 1, False)
    assert "differ" in plan.reason


def test_few_take_turns_if_free_memory_is_unknown(pipeline, timings, monkeypatch):
    """On a device whose memory admission cannot watch, two requests take turns, or as many as the operator sets."""
    pipeline.unet.register_forward_hook(lambda _, __, output: (output[0] + output[0].mean(),))
    monkeypatch.setattr(plan_module, "device_of", lambda _: torch.device("mps"))
    assert plan_of(pipeline).max_active == 2
    assert plan_of(pipeline, max_active=5).max_active == 5


def test_a_joined_call_that_fails_makes_the_plan_provisional(pipeline, timings, monkeypatch):
    """If a joined call raises, requests take turns, and the next start tries again."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(plan_module, "verify", fail)
    plan = plan_of(pipeline)
    assert (plan.max_active, plan.max_rows, plan.provisional) == (8, 1, True)
    assert plan.reason == "A joined call failed with OutOfMemoryError."


def test_a_denoiser_that_cannot_be_measured_makes_the_plan_provisional(pipeline, timings, monkeypatch, logs):
    """If the measurement itself fails, one request runs at a time, and the next start tries again."""
    monkeypatch.setattr(plan_module, "knee", lambda *_, **__: 1 / 0)
    plan = plan_of(pipeline)
    assert (plan.max_active, plan.max_rows, plan.provisional) == (1, 0, True)
    assert [entry["log_level"] for entry in logs] == ["error"]


@pytest.mark.parametrize("name", ["knee", "verify"])
def test_a_device_that_fails_ends_the_start(pipeline, timings, monkeypatch, name):
    """If the device itself fails, there is no plan: no later call can succeed."""

    def fail(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(plan_module, name, fail)
    with pytest.raises(torch.AcceleratorError):
        plan_of(pipeline)


def test_the_number_of_threads_is_restored(pipeline, timings):
    """Torch uses as many threads after the measurement as before."""
    before = torch.get_num_threads()
    plan_of(pipeline)
    assert torch.get_num_threads() == before
