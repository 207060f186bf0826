"""The engine supports every model family from end to end, and previews do not change the image."""

import dataclasses
import functools

from calotype_server.engine import assembly, generation_run
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.types import (
    Decoding,
    Denoising,
    EncodingPrompt,
    Job,
    PreviewMethod,
    PreviewOptions,
    PreviewReady,
)
from support.engine import tiny
from support.engine.families.trial import small
from support.runs import Run

METHODS = (PreviewMethod.HEAD, PreviewMethod.FULL_VAE)


@tiny.every_family
def test_engine_drives_the_family(family, tmp_path, monkeypatch):
    """Each family reports its events and a preview at each step by either method, and the image is as without them."""
    described, made = describe, make_scheduler
    taken = []

    def at_64(*args):
        return dataclasses.replace(described(*args), width=64, height=64)

    def counting(*args):
        scheduler = made(*args)
        step = scheduler.step

        @functools.wraps(step)
        def counted(*args, **kwargs):
            taken.append(None)
            return step(*args, **kwargs)

        scheduler.step = counted
        return scheduler

    monkeypatch.setattr(assembly, "describe", at_64)
    monkeypatch.setattr(generation_run, "make_scheduler", counting)
    pipeline = small(tiny.prompted(family))
    engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, threads=1)
    assert engine.model.preview_methods == METHODS
    steps = 3
    guidance, scheduler = engine.model.guidance_scale, engine.model.scheduler
    pictures = {}
    for method in (*METHODS, PreviewMethod.NONE):
        run = Run(engine)
        taken.clear()
        options = PreviewOptions(method=method)
        with run.with_every_preview(lambda: len(taken)):
            pictures[method] = run(Job("a red apple", None, 64, 32, steps, guidance, 1, scheduler, options))
        assert run.events[:2] == [EncodingPrompt(), Denoising(0, steps)]
        assert run.kinds.count(Decoding) == 1
        previews = [event for event in run.events if isinstance(event, PreviewReady)]
        shown = [] if method is PreviewMethod.NONE else list(range(1, steps + 1))
        assert [(event.step, event.method) for event in previews] == [(step, method) for step in shown]
        assert all(event.pixels.width == 2 * event.pixels.height for event in previews)
    engine.close()
    picture = pictures[PreviewMethod.NONE]
    assert (picture.width, picture.height) == (64, 32)
    assert len(set(picture.data)) > 10
    assert all(each == picture for each in pictures.values())
