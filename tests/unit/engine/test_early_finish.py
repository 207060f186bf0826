"""Finishing early: the predicted image of the current step becomes the final image."""

import dataclasses

import pytest
import torch

from calotype_server import errors
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview.decoders import VaeDecoder
from calotype_server.types import Decoding, Denoising, Withdrawn
from support.checker import guarded
from support.engine import tiny
from support.runs import JOB, Run


@pytest.fixture
def open_engine(tmp_path):
    """Builds engines on tiny pipelines, and closes them at the end."""
    opened = []

    def open_one(pipeline, **options):
        engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, threads=1, **options)
        opened.append(engine)
        return engine

    yield open_one
    for engine in opened:
        engine.close()


def finishing_at(engine, moment, job=JOB):
    """Runs a job and finishes it early when a certain event is reported; returns the run and the image."""
    run = Run(engine)
    report = run.report

    def watch(event):
        report(event)
        if event == moment:
            run.stop.finish()

    run.report = watch
    return run, run(job)


@pytest.mark.parametrize("family", ["sd15", "flux", "lcm", "sd3"])
def test_the_image_is_the_full_decode_of_the_predicted_x0(open_engine, family, monkeypatch):
    """After the first step its predicted x0 is decoded by the pipeline's own tail, and no further step runs."""
    pipeline = tiny.prompted(family)
    engine = open_engine(pipeline)
    width = height = 4 * engine.model.size_multiple
    job = dataclasses.replace(
        JOB, width=width, height=height, scheduler=engine.model.scheduler, guidance_scale=engine.model.guidance_scale
    )
    steps = []
    decode = engine._parts.finisher.decode
    monkeypatch.setattr(engine._parts.finisher, "decode", lambda step, *size: steps.append(step) or decode(step, *size))
    run, picture = finishing_at(engine, Denoising(0, job.step_count), job)
    (step,) = steps
    assert step.number == 1
    exact = VaeDecoder(pipeline, pipeline.vae).decode(step.x0(), width, height)
    expected = (exact[0] * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy().tobytes()
    assert (picture.width, picture.height) == (exact.shape[-1], exact.shape[-2])
    assert picture.data == expected
    assert Decoding(finished_early=True) in run.events


def test_finishing_after_the_last_step_changes_nothing(open_engine):
    """If all steps are done, the image is the usual one, and is not reported as finished early."""
    engine = open_engine(tiny.build("sd15"))
    whole = Run(engine)()
    run, picture = finishing_at(engine, Decoding())
    assert picture == whole
    assert Decoding(finished_early=True) not in run.events


def test_a_cancel_takes_precedence_over_a_finish(open_engine):
    """A run that is both finished and cancelled raises Cancelled."""
    engine = open_engine(tiny.build("sd15"))
    run = Run(engine)
    run.stop.finish()
    run.stop.set()
    with pytest.raises(errors.Cancelled):
        run()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (torch.OutOfMemoryError(), errors.OutOfMemory),
        (torch.AcceleratorError("an illegal memory access"), errors.EngineDead),
        (ValueError("internal details"), errors.GenerationFailed),
    ],
)
def test_a_failure_while_finishing_is_typed(open_engine, monkeypatch, fault, expected):
    """A failing early decode raises the same errors as a run to the end, without internal details."""
    engine = open_engine(tiny.build("sd15"))

    def fail(*_):
        raise fault

    monkeypatch.setattr(engine._parts.finisher, "decode", fail)
    run = Run(engine)
    run.stop.finish()
    with pytest.raises(expected) as caught:
        run()
    assert "internal details" not in str(caught.value)


def test_an_early_image_is_checked_for_safety(open_engine):
    """An image that the checker rejects is withheld, although the pipeline did not run to its end."""
    engine = open_engine(guarded(*[True] * 9))
    run = Run(engine)
    run.stop.finish()
    with pytest.raises(errors.ContentWithheld):
        run()
    assert Withdrawn() in run.events
