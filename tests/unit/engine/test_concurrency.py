"""Several generations on one engine: the same images as alone, and failures that stay in one generation."""

import concurrent.futures
import dataclasses
import threading

import pytest
import torch

from calotype_server import errors
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.batching import plan as plan_module
from calotype_server.engine.batching.batcher import StepBatcher
from calotype_server.engine.batching.measure import Knee, Threads
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.protocol import Stop
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.types import Denoising, PreviewMethod, PreviewOptions, PreviewReady, Schedule
from support.engine import tiny
from support.runs import JOB, PATIENCE, Run

JOBS = [
    JOB,
    dataclasses.replace(JOB, seed=8, step_count=6, prompt="a fox"),
    dataclasses.replace(JOB, seed=9, guidance_scale=1.0),
    dataclasses.replace(JOB, seed=10, width=32, height=32),
    dataclasses.replace(JOB, seed=11, scheduler="EulerDiscreteScheduler"),
]

SILENT = dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.NONE))

POISONED_TIMESTEP = 334
"""A run with three steps has it, a run with four does not."""


@pytest.fixture
def open_engine(tmp_path):
    """Builds engines on tiny pipelines, and closes them at the end."""
    opened = []

    def open_one(pipeline=None, **options):
        options = {"max_active": len(JOBS), "max_rows": 8, "threads": 1, **options}
        batches = []
        engine = build_engine(
            "tiny",
            pipeline or tiny.build("sd15"),
            defaults=Defaults(),
            cache_dir=tmp_path,
            on_batch=batches.append,
            **options,
        )
        opened.append(engine)
        return engine, batches

    yield open_one
    for engine in opened:
        engine.close()


def together(engine, jobs):
    """Returns the images of jobs that run at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as threads:
        return [run.result(PATIENCE) for run in [threads.submit(Run(engine), job) for job in jobs]]


def largest_difference(a, b):
    """Returns the largest difference of two images, in steps of 1/255."""
    assert (a.width, a.height) == (b.width, b.height)
    return max(abs(x - y) for x, y in zip(a.data, b.data, strict=True))


class TestImages:
    """An image does not depend on the other generations."""

    def test_images_made_together_equal_those_made_alone(self, open_engine):
        """Five different requests that share the denoiser's calls get the same images as alone, up to rounding."""
        engine, batches = open_engine()
        assert engine.model.max_batch_rows > 1, engine.model.unbatched_reason
        alone = [Run(engine)(job) for job in JOBS]
        batches.clear()
        for picture, single in zip(together(engine, JOBS), alone, strict=True):
            assert largest_difference(picture, single) <= 1
        assert max(len(batch.sessions) for batch in batches) > 1

    def test_deterministic_images_are_bitwise_the_same(self, open_engine):
        """With batches of one size, the other requests do not change a single bit."""
        engine, _ = open_engine(deterministic=True)
        alone = [Run(engine)(job) for job in JOBS]
        assert together(engine, JOBS) == alone

    def test_each_generation_gets_its_previews(self, open_engine):
        """Each caller gets previews of its own steps, in order, including the last one."""
        engine, _ = open_engine()
        runs = [Run(engine) for _ in JOBS]
        with concurrent.futures.ThreadPoolExecutor(len(JOBS)) as threads:
            list(threads.map(lambda run, job: run(job), runs, JOBS))
        for run, job in zip(runs, JOBS, strict=True):
            shown = [event.step for event in run.events if isinstance(event, PreviewReady)]
            assert shown == sorted(shown)
            assert shown[-1] == job.step_count

    def test_small_calls_use_one_thread_and_the_rest_uses_all(self, open_engine, monkeypatch):
        """A step of one request uses one thread; encoding the prompt and decoding the image use all."""
        monkeypatch.setattr(plan_module, "pick_threads", lambda *_: 1)
        monkeypatch.setattr(plan_module, "knee", lambda *_, **__: Knee(8, Threads(1, 3, 4)))
        pipeline, seen = tiny.build("sd15"), []
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            engine, _ = open_engine(pipeline, threads=None)
        finally:
            torch.set_num_threads(before)
        for name, part in (("text", pipeline.text_encoder), ("step", pipeline.unet), ("picture", pipeline.vae.decoder)):
            part.register_forward_pre_hook(lambda *_, name=name: seen.append((name, torch.get_num_threads())))
        Run(engine)(dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.NONE)))
        assert set(seen) == {("text", 3), ("step", 1), ("picture", 3)}


class TestIsolation:
    """A failure or cancellation of one generation does not affect the others."""

    def test_a_waiting_request_is_cancelled_while_the_device_is_busy(self, open_engine):
        """A cancelled run ends while another request's call still occupies the device."""
        pipeline = tiny.build("sd15")
        engine, _ = open_engine(pipeline)
        entered, release = threading.Event(), threading.Event()

        def hold(*_):
            entered.set()
            assert release.wait(PATIENCE)

        handle = pipeline.unet.register_forward_pre_hook(hold)
        first, second = Run(engine), Run(engine)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            running = threads.submit(first)
            assert entered.wait(PATIENCE)
            waiting = threads.submit(second)
            second.wait_for_step(0)
            second.stop.set()
            with pytest.raises(errors.Cancelled):
                waiting.result(PATIENCE)
            assert not running.done()
            release.set()
            running.result(PATIENCE)
        handle.remove()

    def test_a_failing_request_does_not_affect_another(self, open_engine):
        """If one request's own code raises, another request that runs at the same time gets its usual image."""
        engine, _ = open_engine()
        alone, failing_run = Run(engine)(JOBS[0]), Run(engine)

        def report(event):
            Run.report(failing_run, event)
            if isinstance(event, Denoising) and event.step == 0:
                raise RuntimeError("a failure of this caller only")

        failing_run.report = report
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            failing, healthy = threads.submit(failing_run), threads.submit(Run(engine), JOBS[0])
            with pytest.raises(errors.GenerationFailed):
                failing.result(PATIENCE)
            assert largest_difference(healthy.result(PATIENCE), alone) <= 1

    def test_nan_stays_in_its_row(self, open_engine):
        """A request whose rows are NaN fails with NumericalFailure; others in the same batch get their images."""
        pipeline = tiny.build("sd15")
        engine, batches = open_engine(pipeline)
        alone = Run(engine)(JOBS[0])
        batches.clear()

        def poison(module, args, kwargs, output):
            poisoned = torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else 0)) == POISONED_TIMESTEP
            output[0][poisoned.expand(len(output[0]))] = float("nan")
            return output

        handle = pipeline.unet.register_forward_hook(poison, with_kwargs=True)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            failing = threads.submit(Run(engine), dataclasses.replace(JOBS[0], step_count=3))
            healthy = threads.submit(Run(engine), JOBS[0])
            with pytest.raises(errors.NumericalFailure):
                failing.result(PATIENCE)
            assert largest_difference(healthy.result(PATIENCE), alone) <= 1
        handle.remove()

    def test_a_dead_device_ends_all_generations(self, open_engine):
        """All running and all later generations fail with EngineDead."""
        pipeline = tiny.build("sd15")
        engine, _ = open_engine(pipeline)

        def die(*_):
            raise torch.AcceleratorError("an illegal memory access was encountered")

        handle = pipeline.unet.register_forward_pre_hook(die)
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            for run in [threads.submit(Run(engine)) for _ in range(3)]:
                with pytest.raises(errors.EngineDead):
                    run.result(PATIENCE)
        handle.remove()
        with pytest.raises(errors.EngineDead):
            Run(engine)()

    def test_memory_that_runs_out_in_a_decoder_frees_the_runtime(self, open_engine, monkeypatch):
        """The generation fails, and the device thread frees memory that only serves speed, such as graphs."""
        freed = threading.Event()
        monkeypatch.setattr(EagerRuntime, "free_memory", lambda _: freed.set() or True)
        pipeline = tiny.build("sd15")
        engine, _ = open_engine(pipeline)

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        handle = pipeline.vae.decoder.register_forward_pre_hook(fail)
        with pytest.raises(errors.OutOfMemory):
            Run(engine)()
        assert freed.wait(PATIENCE)
        handle.remove()
        Run(engine)()


class TestPlan:
    """The engine follows its batching plan."""

    def test_a_model_with_state_serves_one_request_at_a_time(self, open_engine):
        """A model with a cache between steps reports why it is not shared, and still generates images."""
        pipeline = tiny.build("sd15")
        pipeline.unet.is_cache_enabled = True
        engine, _ = open_engine(pipeline, max_active=4)
        assert engine.model.max_active == 1
        assert "cache" in engine.model.unbatched_reason
        Run(engine)()

    def test_a_model_with_dependent_rows_takes_turns(self, open_engine):
        """If answers depend on other rows in the batch, calls are never joined, and images are as alone."""
        pipeline = tiny.build("sd15")
        pipeline.unet.register_forward_hook(lambda _, __, output: (output[0] + output[0].mean(),))
        engine, batches = open_engine(pipeline, max_active=3)
        assert engine.model.max_batch_rows == 0
        assert "differ" in engine.model.unbatched_reason
        alone = [Run(engine)(job) for job in JOBS[:3]]
        assert together(engine, JOBS[:3]) == alone
        assert {len(batch.sessions) for batch in batches} == {1}


class TestSchedule:
    """The engine follows its schedule."""

    @pytest.mark.parametrize(("schedule", "progressing"), [(Schedule.FIRST_LOOK, 4), (Schedule.FAIR, 0)])
    def test_the_model_says_how_many_progress(self, open_engine, schedule, progressing):
        """Eight rows are four generations with guidance; in turn, all progress."""
        engine, _ = open_engine(schedule=schedule)
        assert engine.model.max_progressing == progressing

    def test_the_first_step_is_announced_once(self, open_engine, monkeypatch):
        """A generation is urgent until its first step is done."""
        looks = []
        monkeypatch.setattr(StepBatcher, "note_look", lambda _, slot: looks.append(slot.number))
        engine, batches = open_engine()
        Run(engine)(SILENT)
        assert looks == [batches[-1].sessions[0]]


class TestStop:
    """The signal that ends a run."""

    def test_each_callback_is_called_once(self):
        """`set` calls the registered callbacks; a callback that is registered later is called at once."""
        stop, called = Stop(), []
        stop.call(lambda: called.append("before"))
        assert not called
        stop.set()
        stop.set()
        stop.call(lambda: called.append("after"))
        assert called == ["before", "after"]
        assert stop.is_set()
