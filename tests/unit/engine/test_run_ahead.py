"""The engine does not run ahead of its device, however many generations it runs."""

import concurrent.futures
import dataclasses

import pytest
import torch

from calotype_server import errors
from calotype_server.engine import generation_run
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.batching import plan as plan_module
from calotype_server.engine.batching import run_ahead as run_ahead_module
from calotype_server.engine.capabilities import Defaults
from calotype_server.types import Denoising, PreviewMethod, PreviewOptions, PreviewReady
from support.engine import tiny
from support.engine.device import LaggingDevice
from support.runs import JOB, PATIENCE, STEPS, Run

SILENT = dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.NONE))


@pytest.fixture
def open_engine(tmp_path):
    """Builds engines for one generation at a time, and closes them at the end."""
    opened = []

    def open_one(pipeline, **options):
        engine = build_engine(
            "tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, **{"threads": 1, "max_active": 1, **options}
        )
        opened.append(engine)
        return engine

    yield open_one
    for engine in opened:
        engine.close()


def with_state():
    """Returns a pipeline that must call its denoiser itself, because it keeps state between steps."""
    pipeline = tiny.build("sd15")
    pipeline.unet.is_cache_enabled = True
    return pipeline


def steps(run):
    """Returns the numbers of the steps that a run has reported."""
    return sorted({event.step for event in run.events if isinstance(event, (Denoising, PreviewReady))})


def test_one_generation_at_a_time_uses_the_device_thread(open_engine):
    """With `--max-active 1`, calls go through the batcher one by one, with the threads that are fastest for one."""
    batches, seen = [], []
    pipeline = tiny.build("sd15")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "pick_threads", lambda *_: 1)
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            engine = open_engine(pipeline, threads=None, on_batch=batches.append)
        finally:
            torch.set_num_threads(before)
    pipeline.unet.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    Run(engine)(SILENT)
    assert [(batch.rows, len(batch.sessions)) for batch in batches[-STEPS:]] == [(2, 1)] * STEPS
    assert set(seen) == {1}
    assert (engine.model.max_active, engine.model.max_batch_rows) == (1, 0)
    assert engine.model.unbatched_reason == "The server was started with --max-active 1."


class TestAPipelineThatCallsTheDenoiserItself:
    """A stand-in for a CUDA device computes a step when the test says so."""

    @pytest.fixture
    def device(self, monkeypatch):
        """Replaces the device that the engine follows."""
        device = LaggingDevice()
        monkeypatch.setattr(generation_run, "RunAhead", device.run_ahead)
        return device

    def test_progress_waits_for_the_device(self, open_engine, device):
        """A step is reported when the step before is computed, and no further step is launched until then."""
        run = Run(open_engine(with_state()))
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            running = threads.submit(run, SILENT)
            for number in range(STEPS - 1):
                run.wait_for_step(number + 1)
                device.wait_for_launch(number + 1)
                assert device.events[number].waiting.wait(PATIENCE)
                assert steps(run) == list(range(number + 2))
                assert len(device.events) == number + 2
                device.compute(number)
            running.result(PATIENCE)

    def test_a_cancel_launches_no_further_step(self, open_engine, device):
        """A cancelled generation ends when the step that the device computes is done."""
        run = Run(open_engine(with_state()))
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            running = threads.submit(run, SILENT)
            device.wait_for_launch(1)
            run.stop.set()
            device.compute(0)
            with pytest.raises(errors.Cancelled):
                running.result(PATIENCE)
        assert len(device.events) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("build", [with_state, lambda: tiny.build("sd15")], ids=["direct", "batcher"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_launches_do_not_run_ahead_of_cuda(open_engine, monkeypatch, build, scheduler):
    """On CUDA, at most two steps are launched and not computed whenever a step is reported."""
    events, ahead = [], []
    record = run_ahead_module._record_on_cuda

    def recorded(device):
        events.append(record(device))
        return events[-1]

    monkeypatch.setattr(run_ahead_module, "_record_on_cuda", recorded)
    pipeline = build()
    pipeline.to("cuda")
    run = Run(open_engine(pipeline))
    report = run.report

    def reported(event):
        ahead.append(sum(not each.query() for each in events))
        report(event)

    run.report = reported
    run(dataclasses.replace(SILENT, step_count=30, scheduler=scheduler))
    assert len(events) >= 30
    assert max(ahead) <= 2
