"""`--accelerate compile` with the real compiler, from the start of an engine to its images."""

import dataclasses
import inspect
import threading

import diffusers
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from support.engine import tiny
from support.runs import JOB, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEEDS = (1, 2)


@pytest.fixture(autouse=True)
def _compiler(monkeypatch):
    """Forgets compiled code, and restores the environment."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    yield
    torch.compiler.reset()


@pytest.fixture
def plain_calls():
    """Lists the calls of the UNet's own Python code, in all threads that start later; compiled code does not run it."""
    forward, calls = inspect.unwrap(diffusers.UNet2DConditionModel.forward).__code__, []

    def note(frame, event, _):
        if event == "call" and frame.f_code is forward:
            calls.append(threading.current_thread().name)

    threading.setprofile(note)
    yield calls
    threading.setprofile(None)


def started(accelerate, cache_dir):
    """Starts an engine as a new process would, without compiled code in memory; counts from zero."""
    torch.compiler.reset()
    counters.clear()
    engine = build_engine(
        "tiny",
        tiny.build("sd15"),
        defaults=Defaults(),
        cache_dir=cache_dir,
        accelerate=accelerate,
        max_active=2,
        max_rows=4,
        threads=1,
    )
    assert (engine.model.accelerator, engine.model.accelerator_fallback) == (accelerate, "")
    return engine


def images(engine):
    """Returns an image that was alone, and images that were generated together, as arrays of pixels."""
    job = dataclasses.replace(JOB, width=engine.model.width, height=engine.model.height)
    together = {}

    def run(seed):
        together[seed] = Run(engine)(dataclasses.replace(job, seed=seed))

    alone = Run(engine)(job)
    threads = [threading.Thread(target=run, args=(seed,)) for seed in SEEDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [np.frombuffer(each.data, np.uint8).astype(int) for each in (alone, *(together[seed] for seed in SEEDS))]


def compiled():
    """Returns how much was compiled: traced graphs, and generated or loaded code."""
    return counters["stats"]["unique_graphs"], sum(counters["inductor"].values())


def test_a_whole_unet_is_compiled_at_load_and_cached(tmp_path, plain_calls):
    """Requests use compiled code and compile nothing; images are right up to rounding; the next start loads code."""
    pictures, misses = {}, []
    for name in ("none", "compile", "compile"):
        engine = started(name, tmp_path)
        misses.append(counters["inductor"]["fxgraph_cache_miss"])
        before = compiled()
        plain_calls.clear()
        pictures[name] = images(engine)
        assert compiled() == before
        assert bool(plain_calls) == (name == "none")
        engine.close()
    for ours, theirs in zip(pictures["compile"], pictures["none"], strict=True):
        assert np.abs(ours - theirs).max() <= 1
    assert misses[1] > 0
    assert misses[2] == 0
    assert counters["inductor"]["fxgraph_cache_hit"] > 0
    assert any((tmp_path / "inductor").iterdir())
