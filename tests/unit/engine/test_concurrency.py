"""Several generations on one engine: the same pictures as alone, and each with its own fate."""

import concurrent.futures
import dataclasses
import threading

import pytest
import torch

from calotype_server import errors
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.batching import plan as plan_module
from calotype_server.engine.batching.measure import Knee, Threads
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.protocol import Stop
from calotype_server.types import Denoising, PreviewMethod, PreviewOptions, PreviewReady
from support.engine import tiny
from support.runs import JOB, PATIENCE, Run

JOBS = [
    JOB,
    dataclasses.replace(JOB, seed=8, step_count=6, prompt="a fox"),
    dataclasses.replace(JOB, seed=9, guidance_scale=1.0),
    dataclasses.replace(JOB, seed=10, width=32, height=32),
    dataclasses.replace(JOB, seed=11, scheduler="EulerDiscreteScheduler"),
]

DOOMED_TIMESTEP = 334
"""Of a run with three steps, and of no run with four."""


@pytest.fixture
def open_engine(tmp_path):
    """Makes engines over tiny pipelines, which are closed in the end."""
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
    """The pictures of jobs that run at once."""
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as threads:
        return [run.result(PATIENCE) for run in [threads.submit(Run(engine), job) for job in jobs]]


def largest_difference(a, b):
    """In steps of 1/255."""
    assert (a.width, a.height) == (b.width, b.height)
    return max(abs(x - y) for x, y in zip(a.data, b.data, strict=True))


class TestPictures:
    """Company changes nothing."""

    def test_pictures_made_together_are_those_made_alone(self, open_engine):
        """Five kinds of request share the denoiser's calls, and nobody's picture shows it."""
        engine, batches = open_engine()
        assert engine.model.max_batch_rows > 1, engine.model.unbatched_reason
        alone = [Run(engine)(job) for job in JOBS]
        batches.clear()
        for picture, single in zip(together(engine, JOBS), alone, strict=True):
            assert largest_difference(picture, single) <= 1
        assert max(len(batch.sessions) for batch in batches) > 1

    def test_deterministic_pictures_are_bitwise_the_same(self, open_engine):
        """Rounding does not depend on the company when every batch has the same size."""
        engine, _ = open_engine(deterministic=True)
        alone = [Run(engine)(job) for job in JOBS]
        assert together(engine, JOBS) == alone

    def test_previews_come_for_all(self, open_engine):
        """Each caller gets the previews of its own steps."""
        engine, _ = open_engine()
        runs = [Run(engine) for _ in JOBS]
        with concurrent.futures.ThreadPoolExecutor(len(JOBS)) as threads:
            list(threads.map(lambda run, job: run(job), runs, JOBS))
        for run, job in zip(runs, JOBS, strict=True):
            shown = [event.step for event in run.events if isinstance(event, PreviewReady)]
            assert shown == sorted(shown)
            assert shown[-1] == job.step_count

    def test_small_calls_have_one_thread_and_all_else_has_all(self, open_engine, monkeypatch):
        """One request's step is not worth handing out; a batch, the prompt and the picture are."""
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


class TestFates:
    """What happens to one does not happen to the others."""

    def test_a_parked_request_is_cancelled_while_the_device_is_busy(self, open_engine):
        """Its run ends before the call of another that holds the device."""
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
            parked = threads.submit(second)
            second.wait_for_step(0)
            second.stop.set()
            with pytest.raises(errors.Cancelled):
                parked.result(PATIENCE)
            assert not running.done()
            release.set()
            running.result(PATIENCE)
        handle.remove()

    def test_trouble_of_one_is_not_the_trouble_of_another(self, open_engine):
        """One request's own code raises in mid-run; its mate gets the picture it would get alone."""
        engine, _ = open_engine()
        alone, doomed = Run(engine)(JOBS[0]), Run(engine)

        def report(event):
            Run.report(doomed, event)
            if isinstance(event, Denoising) and event.step == 0:
                raise RuntimeError("this caller's own trouble")

        doomed.report = report
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            failing, healthy = threads.submit(doomed), threads.submit(Run(engine), JOBS[0])
            with pytest.raises(errors.GenerationFailed):
                failing.result(PATIENCE)
            assert largest_difference(healthy.result(PATIENCE), alone) <= 1

    def test_numbers_that_break_stay_in_their_row(self, open_engine):
        """The request whose rows are NaN fails by name; its mates in the same batch get their pictures."""
        pipeline = tiny.build("sd15")
        engine, batches = open_engine(pipeline)
        alone = Run(engine)(JOBS[0])
        batches.clear()

        def poison(module, args, kwargs, output):
            doomed = torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else 0)) == DOOMED_TIMESTEP
            output[0][doomed.expand(len(output[0]))] = float("nan")
            return output

        handle = pipeline.unet.register_forward_hook(poison, with_kwargs=True)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            failing = threads.submit(Run(engine), dataclasses.replace(JOBS[0], step_count=3))
            healthy = threads.submit(Run(engine), JOBS[0])
            with pytest.raises(errors.NumericalFailure):
                failing.result(PATIENCE)
            assert largest_difference(healthy.result(PATIENCE), alone) <= 1
        handle.remove()

    def test_a_dead_device_ends_everybody(self, open_engine):
        """All that run, and all that come, are told that the engine cannot go on."""
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


class TestPlan:
    """What is decided when the model is loaded."""

    def test_a_model_that_keeps_state_serves_one_at_a_time(self, open_engine):
        """A cache between steps would mix requests up: the plan says so, and a picture is still made."""
        pipeline = tiny.build("sd15")
        pipeline.unet.is_cache_enabled = True
        engine, _ = open_engine(pipeline, max_active=4)
        assert engine.model.max_active == 1
        assert "cache" in engine.model.unbatched_reason
        Run(engine)()

    def test_a_model_whose_rows_mix_takes_turns(self, open_engine):
        """Answers that depend on the company are found out, and calls are never joined."""
        pipeline = tiny.build("sd15")
        pipeline.unet.register_forward_hook(lambda _, __, output: (output[0] + output[0].mean(),))
        engine, batches = open_engine(pipeline, max_active=3)
        assert engine.model.max_batch_rows == 0
        assert "differ" in engine.model.unbatched_reason
        alone = [Run(engine)(job) for job in JOBS[:3]]
        assert together(engine, JOBS[:3]) == alone
        assert {len(batch.sessions) for batch in batches} == {1}


class TestStop:
    """The signal that ends a run."""

    def test_callbacks_are_called_once_whenever_they_come(self):
        """Those registered before are called by `set`, those after it at once."""
        stop, called = Stop(), []
        stop.call(lambda: called.append("before"))
        assert not called
        stop.set()
        stop.set()
        stop.call(lambda: called.append("after"))
        assert called == ["before", "after"]
        assert stop.is_set()
