"""All previews of a pipeline: the head is found or fitted, learns from finished images, and is kept."""

import dataclasses
import threading

import pytest
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.engine.preview.decoders import HeadDecoder
from calotype_server.engine.preview.head_cache import head_path, load_head
from calotype_server.types import PreviewMethod, PreviewOptions
from support.engine import tiny
from support.runs import JOB, PATIENCE, Run


def start(cache, **others):
    """An engine on the tiny SD1.5."""
    return build_engine("tiny", tiny.shared("sd15"), defaults=Defaults(), cache_dir=cache, threads=1, **others)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The bytes of a freshly fitted head."""
    cache = tmp_path_factory.mktemp("cache")
    start(cache).close()
    return head_path(cache, tiny.shared("sd15")).read_bytes()


@pytest.fixture
def path(tmp_path, calibrated):
    """Where the head is kept, with that head in place."""
    path = head_path(tmp_path, tiny.shared("sd15"))
    path.parent.mkdir(parents=True)
    path.write_bytes(calibrated)
    return path


@pytest.mark.parametrize("method", [PreviewMethod.AUTO, PreviewMethod.NONE])
def test_each_finished_image_is_a_lesson(tmp_path, path, method):
    """Whatever was shown on the way, what the full decoder made of the last step is learnt, and kept at the end."""
    engine = start(tmp_path)
    for seed in (1, 2):
        Run(engine)(dataclasses.replace(JOB, seed=seed, preview=PreviewOptions(method=method)))
    engine.close()
    kept = load_head(path)
    # Each picture of 64x48 has 48 cells, which count three times; the first has begun to fade.
    assert kept.learned.count == pytest.approx(48 * 3 * (1 + 127 / 128))


def test_lessons_go_on_after_a_restart(tmp_path, path):
    """The next server knows what this one has learnt, and adds to it."""
    counts = []
    for seed in (1, 2):
        engine = start(tmp_path)
        Run(engine)(dataclasses.replace(JOB, seed=seed))
        engine.close()
        counts.append(load_head(path).learned.count)
    assert counts == [pytest.approx(48 * 3), pytest.approx(48 * 3 * (1 + 127 / 128))]


def test_lessons_are_saved_now_and_then(tmp_path, path):
    """A server that is killed loses a few lessons, not all."""
    engine = start(tmp_path)
    for _ in range(8):
        Run(engine)()
    learnt = threading.Event()
    engine._parts.previews._renderer.when_idle(learnt.set)
    assert learnt.wait(PATIENCE)
    assert load_head(path).learned is not None
    engine.close()


def test_lessons_draw_this_models_images_better(tmp_path, path):
    """After a few images, one with another seed is drawn nearer to what the full decoder makes of it."""
    engine = start(tmp_path)
    untaught = load_head(path)
    for seed in range(12):
        Run(engine)(dataclasses.replace(JOB, seed=seed, preview=PreviewOptions(method=PreviewMethod.NONE)))
    engine.close()
    taught = load_head(path)
    pipeline = tiny.shared("sd15")
    call = {"prompt": JOB.prompt, "width": 64, "height": 48, "num_inference_steps": JOB.step_count}
    errors = {"untaught": 0.0, "taught": 0.0}
    for seed in (100, 101, 102):
        latents, picture = (
            pipeline(**call, generator=torch.Generator().manual_seed(seed), output_type=kind)[0]
            for kind in ("latent", "pt")
        )
        for name, head in (("untaught", untaught), ("taught", taught)):
            errors[name] += float((head.decode(latents, 64, 48) - picture).square().mean())
    assert errors["taught"] < 0.8 * errors["untaught"]


def test_the_same_model_gives_the_same_head(tmp_path, calibrated):
    """Calibration is deterministic to the last byte of its file."""
    start(tmp_path).close()
    assert head_path(tmp_path, tiny.shared("sd15")).read_bytes() == calibrated


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: whole[:0], lambda whole: b"{}" + whole])
def test_a_damaged_head_is_rebuilt_with_a_warning(tmp_path, path, calibrated, logs, damage):
    """The server starts with the head that it would have fitted anew, and the file is whole again."""
    path.write_bytes(damage(calibrated))
    engine = start(tmp_path)
    engine.close()
    assert PreviewMethod.HEAD in engine.model.preview_methods
    assert [entry["path"] for entry in logs if entry["log_level"] == "warning"] == [str(path)]
    assert path.read_bytes() == calibrated


def test_what_is_not_allowed_is_not_even_fitted(tmp_path):
    """A server without HEAD has no head to keep."""
    engine = start(tmp_path, preview_methods={PreviewMethod.FULL_VAE})
    Run(engine)()
    engine.close()
    assert engine.model.preview_methods == (PreviewMethod.FULL_VAE,)
    assert list(tmp_path.iterdir()) == []


def test_decoders_are_measured_as_the_preview_thread_runs_them(tmp_path, path, monkeypatch):
    """By one thread: the processor's time of a second one would not be seen."""
    seen = []
    monkeypatch.setattr(HeadDecoder, "decode", lambda *_: seen.append(torch.get_num_threads()))
    build_engine("tiny", tiny.shared("sd15"), defaults=Defaults(), cache_dir=tmp_path, threads=3).close()
    assert set(seen) == {1}


def test_the_budget_is_told_what_decoders_cost(tmp_path, path):
    """The head is measured at load; the full VAE, which may be slow, by the end of the first picture."""
    budget = PreviewBudget(0.02)
    engine = start(tmp_path, budget=budget)
    assert budget.cost(PreviewMethod.HEAD, 64 * 64) > 0
    assert budget.cost(PreviewMethod.FULL_VAE, 64 * 64) is None
    Run(engine)()
    engine.close()
    assert budget.cost(PreviewMethod.FULL_VAE, 64 * 64) > 0
    assert budget.stride(PreviewMethod.HEAD, 64 * 64) >= 1
