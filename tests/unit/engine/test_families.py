"""The engine drives every family from end to end."""

import dataclasses
import functools

import pytest

from calotype_server.engine import diffusers as engine_module
from calotype_server.engine.capabilities import Defaults, denoiser_name
from calotype_server.engine.diffusers import DiffusersEngine
from calotype_server.types import Decoding, Denoising, EncodingPrompt, Job, PreviewReady
from support import tiny
from support.runs import Run

# The others round every size to one of the real model's, which is far too large here.
DRIVEN = [family for family in tiny.FAMILIES if family not in ("pixart_sigma", "sana", "sana_sprint")]


@pytest.mark.parametrize("family", DRIVEN)
def test_engine_drives_the_family(family, tmp_path, monkeypatch):
    """Any family gives its events, a preview at each step and a picture of the size asked for."""
    described, made = engine_module.describe, engine_module.make_scheduler
    taken = []

    def small(*args):
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

    monkeypatch.setattr(engine_module, "describe", small)
    monkeypatch.setattr(engine_module, "calibrate", functools.partial(engine_module.calibrate, budget=0.0))
    monkeypatch.setattr(engine_module, "make_scheduler", counting)
    pipeline = tiny.prompted(family)
    engine = DiffusersEngine("tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, threads=1)
    run = Run(engine)

    def wait_for_pictures(module, inputs):
        run.wait_for_step(len(taken))

    getattr(pipeline, denoiser_name(pipeline)).register_forward_pre_hook(wait_for_pictures)
    picture = run(Job("a red apple", None, 64, 32, 3, engine.model.guidance_scale, 1, engine.model.scheduler))
    engine.close()
    assert (picture.width, picture.height) == (64, 32)
    assert len(set(picture.data)) > 10
    assert run.events[:2] == [EncodingPrompt(), Denoising(0, 3)]
    assert run.kinds.count(Decoding) == 1
    previews = [event for event in run.events if isinstance(event, PreviewReady)]
    assert {1, 2} <= {event.step for event in previews}
    assert all(event.pixels.width == 2 * event.pixels.height for event in previews)
