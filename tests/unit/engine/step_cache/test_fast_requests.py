"""Requests with `Speed.FAST` on a real engine: alone, next to exact ones, and early ends."""

import concurrent.futures
import dataclasses
import math

import numpy as np
import pytest

from calotype_server.engine import loading
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.capabilities.schedulers import scheduler_details
from calotype_server.engine.schedulers.names import Name, read_name
from calotype_server.engine.step_cache import offered
from calotype_server.engine.step_cache.offered import fast_schedulers
from calotype_server.types import (
    Decoding,
    PreviewMethod,
    PreviewOptions,
    PreviewReady,
    SchedulerInfo,
    Speed,
    forecast_steps,
)
from support.engine import tiny
from support.runs import JOB, PATIENCE, Run

TOTAL = 16
EXACT = dataclasses.replace(JOB, step_count=TOTAL)
FAST = dataclasses.replace(EXACT, speed=Speed.FAST)
COMPUTED = TOTAL - len(forecast_steps(TOTAL))


@pytest.fixture
def open_engine(tmp_path):
    """Builds engines that offer the step cache, and closes them at the end."""
    opened = []

    def open_one(pipeline=None, **options):
        options = {"max_active": 2, "max_rows": 8, "threads": 1, "step_cache": True, **options}
        pipeline = pipeline or tiny.build("sd15")
        opened.append(build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, **options))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()


def computed(run):
    """Returns the number of computed steps that a run reported."""
    return next(event.computed_steps for event in run.events if isinstance(event, Decoding))


@pytest.mark.parametrize("max_active", [1, 2])
def test_skipped_steps_are_neither_computed_nor_hidden(open_engine, max_active):
    """With and without batching, the denoiser runs once per computed step, and all steps have progress."""
    pipeline = tiny.build("sd15")
    engine = open_engine(pipeline, max_active=max_active)
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    run = Run(engine)
    run(dataclasses.replace(FAST, preview=PreviewOptions(method=PreviewMethod.NONE)))
    assert len(calls) == computed(run) == COMPUTED
    steps = [event.step for event in run.events if hasattr(event, "step")]
    assert steps == list(range(TOTAL + 1))


def test_previews_continue(open_engine):
    """Steps that are forecast have previews too."""
    pipeline = tiny.build("sd15")
    engine = open_engine(pipeline)
    run = Run(engine)
    run(FAST)
    shown = [event.step for event in run.events if isinstance(event, PreviewReady)]
    assert shown[-1] == TOTAL


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_exact_request_is_not_changed_by_a_fast_one(open_engine, deterministic):
    """An exact request next to a fast one gets the image that it gets alone, bit for bit with `--deterministic`."""
    engine = open_engine(deterministic=deterministic)
    alone = [Run(engine)(job) for job in (EXACT, FAST)]
    runs = [Run(engine), Run(engine)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        started = [threads.submit(run, job) for run, job in zip(runs, (EXACT, FAST), strict=True)]
        together = [each.result(PATIENCE) for each in started]
    assert [computed(run) for run in runs] == [TOTAL, COMPUTED]
    assert alone[0] != alone[1]
    if deterministic:
        assert together == alone
    for a, b in zip(together, alone, strict=True):
        assert max(abs(x - y) for x, y in zip(a.data, b.data, strict=True)) <= 1


def test_too_few_steps_change_nothing(open_engine):
    """A fast request in which no step can be forecast has the same image as an exact one."""
    engine = open_engine()
    short = dataclasses.replace(FAST, step_count=6)
    assert Run(engine)(short) == Run(engine)(dataclasses.replace(short, speed=Speed.EXACT))


@pytest.mark.slow
def test_every_scheduler_on_offer_works(open_engine):
    """Each scheduler on offer skips steps and gives a finite image."""
    engine = open_engine(max_active=1)
    assert {"DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"} <= set(engine.model.fast_schedulers)
    for offered_name in engine.model.fast_schedulers:
        run, name = Run(engine), read_name(offered_name) or Name(offered_name)
        none = PreviewOptions(method=PreviewMethod.NONE)
        run(dataclasses.replace(FAST, scheduler=name.scheduler, sigmas=name.sigmas, preview=none))
        assert computed(run) < TOTAL


@tiny.every_family
def test_schedulers_that_add_noise_are_not_offered(family):
    """Ancestral samplers, DDPM, consistency models and solvers of two stages are not offered, nor SDE variants."""
    pipeline = tiny.shared(family)
    own = type(pipeline.scheduler).__name__
    details = scheduler_details(pipeline, (own, "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"))
    names = set(fast_schedulers(pipeline, details))
    assert (own in names) == (family not in ("lcm", "sana_sprint"))
    assert not names & {"EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "Heun", "Euler a"}


def test_aliases_are_offered_unless_they_add_noise(sd15):
    """Of the aliases of one class, those that stand for an SDE are not offered."""
    details = scheduler_details(sd15, ("DPMSolverMultistepScheduler",))
    assert fast_schedulers(sd15, details) == ("DPM++ 2M", "DPM++ 2M Karras", "DPMSolverMultistepScheduler")


def test_variants_that_add_noise_are_not_offered(monkeypatch):
    """A solver that is configured as an SDE, or to sample at random, is not offered."""
    for config in ({"algorithm_type": "sde-dpmsolver++"}, {"stochastic_sampling": True}):
        scheduler = type("Scheduler", (), {"config": config})()
        monkeypatch.setattr(offered, "make_scheduler", lambda *_, scheduler=scheduler: scheduler)
        assert fast_schedulers(None, [SchedulerInfo("DPMSolverMultistepScheduler")]) == ()


def test_it_is_off_by_default(open_engine):
    """Without `--step-cache`, no scheduler is offered."""
    assert open_engine(step_cache=False).model.fast_schedulers == ()


def test_a_model_with_hooks_does_not_offer_it(open_engine, logs):
    """A denoiser that keeps state between calls does not offer the step cache, and the log has the reason."""
    pipeline = tiny.build("sd15")
    pipeline.unet._hf_hook = object()
    assert open_engine(pipeline, max_active=1).model.fast_schedulers == ()
    (entry,) = [entry for entry in logs if entry["event"] == "the step cache is not offered"]
    assert "Accelerate" in entry["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_fast_image_is_closer_than_one_with_fewer_steps(tmp_path, scheduler):
    """With the bundled model and 28 steps, FAST is at least 25 dB from EXACT, and better than as many exact steps."""
    pipeline = loading.load_pipeline(loading.LoadOptions(model="bundled"))
    engine = build_engine(
        "bundled", pipeline, defaults=Defaults(), cache_dir=tmp_path, threads=1, max_active=1, step_cache=True
    )
    try:
        for prompt, guidance in (("a red apple", 3.0), ("rocket", 1.0)):
            job = dataclasses.replace(
                JOB,
                prompt=prompt,
                width=128,
                height=128,
                step_count=28,
                guidance_scale=guidance,
                scheduler=scheduler,
                preview=PreviewOptions(method=PreviewMethod.NONE),
            )
            exact, run = Run(engine)(job), Run(engine)
            fast = run(dataclasses.replace(job, speed=Speed.FAST))
            fewer = Run(engine)(dataclasses.replace(job, step_count=computed(run)))
            assert computed(run) * 1.5 <= 28
            assert psnr(fast, exact) >= 25
            assert psnr(fast, exact) > psnr(fewer, exact) + 2
    finally:
        engine.close()


def psnr(a, b):
    """Returns the peak signal-to-noise ratio of two images in dB."""
    difference = np.frombuffer(a.data, np.uint8).astype(float) - np.frombuffer(b.data, np.uint8)
    return 20 * math.log10(255) - 10 * math.log10(max((difference**2).mean(), 1e-6))
