"""All previews of a pipeline: the head is loaded or fitted, learns from final images, and is saved."""

import dataclasses
import threading
from unittest.mock import Mock

import pytest
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview import pipeline_previews
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.engine.preview.decoders import HeadDecoder
from calotype_server.engine.preview.device_stream import CpuStream
from calotype_server.engine.preview.head_cache import head_path, load_head
from calotype_server.types import PreviewMethod, PreviewOptions
from support.engine import tiny
from support.engine.device_errors import FAILED, OTHER
from support.runs import JOB, PATIENCE, Run


def start(cache, **others):
    """Builds an engine on the tiny SD1.5."""
    return build_engine("tiny", tiny.shared("sd15"), defaults=Defaults(), cache_dir=cache, threads=1, **others)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The bytes of a freshly fitted head."""
    cache = tmp_path_factory.mktemp("cache")
    start(cache).close()
    return head_path(cache, tiny.shared("sd15")).read_bytes()


@pytest.fixture
def path(tmp_path, calibrated):
    """The file of the head, which holds the freshly fitted one."""
    path = head_path(tmp_path, tiny.shared("sd15"))
    path.parent.mkdir(parents=True)
    path.write_bytes(calibrated)
    return path


@pytest.mark.parametrize("method", [PreviewMethod.AUTO, PreviewMethod.NONE])
def test_the_head_learns_from_each_final_image(tmp_path, path, method):
    """With any preview method, the head learns from the final image, and is saved at the end."""
    engine = start(tmp_path)
    for seed in (1, 2):
        Run(engine)(dataclasses.replace(JOB, seed=seed, preview=PreviewOptions(method=method)))
    engine.close()
    kept = load_head(path)
    # Each image of 64x48 has 48 cells with a weight of three; the first has lost 1/128.
    assert kept.learned.count == pytest.approx(48 * 3 * (1 + 127 / 128))


def test_learning_continues_after_a_restart(tmp_path, path):
    """A second engine starts with the learned head, and adds to it."""
    counts = []
    for seed in (1, 2):
        engine = start(tmp_path)
        Run(engine)(dataclasses.replace(JOB, seed=seed))
        engine.close()
        counts.append(load_head(path).learned.count)
    assert counts == [pytest.approx(48 * 3), pytest.approx(48 * 3 * (1 + 127 / 128))]


def test_the_head_is_saved_every_eight_images(tmp_path, path):
    """After eight images the head is saved, so that a killed server loses at most a few."""
    engine = start(tmp_path)
    for _ in range(8):
        Run(engine)()
    learned = threading.Event()
    engine._parts.previews._renderer.when_idle(learned.set)
    assert learned.wait(PATIENCE)
    assert load_head(path).learned is not None
    engine.close()


def test_learning_lowers_the_error_on_other_images(tmp_path, path):
    """After twelve images, the error on images with other seeds falls by at least a fifth."""
    engine = start(tmp_path)
    calibrated_head = load_head(path)
    for seed in range(12):
        Run(engine)(dataclasses.replace(JOB, seed=seed, preview=PreviewOptions(method=PreviewMethod.NONE)))
    engine.close()
    learned_head = load_head(path)
    pipeline = tiny.shared("sd15")
    call = {"prompt": JOB.prompt, "width": 64, "height": 48, "num_inference_steps": JOB.step_count}
    errors = {"calibrated_head": 0.0, "learned_head": 0.0}
    for seed in (100, 101, 102):
        latents, picture = (
            pipeline(**call, generator=torch.Generator().manual_seed(seed), output_type=kind)[0]
            for kind in ("latent", "pt")
        )
        for name, head in (("calibrated_head", calibrated_head), ("learned_head", learned_head)):
            errors[name] += float((head.decode(latents, 64, 48) - picture).square().mean())
    assert errors["learned_head"] < 0.8 * errors["calibrated_head"]


def test_the_same_model_gives_the_same_head(tmp_path, calibrated):
    """Calibration is deterministic to the last byte of its file."""
    start(tmp_path).close()
    assert head_path(tmp_path, tiny.shared("sd15")).read_bytes() == calibrated


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: whole[:0], lambda whole: b"{}" + whole])
def test_a_damaged_head_is_rebuilt_with_a_warning(tmp_path, path, calibrated, logs, damage):
    """A damaged file is replaced by a newly fitted head, with one warning."""
    path.write_bytes(damage(calibrated))
    engine = start(tmp_path)
    engine.close()
    assert PreviewMethod.HEAD in engine.model.preview_methods
    assert [entry["path"] for entry in logs if entry["log_level"] == "warning"] == [str(path)]
    assert path.read_bytes() == calibrated


def test_a_method_that_is_not_allowed_is_not_fitted(tmp_path):
    """A server without HEAD neither fits nor saves a head."""
    engine = start(tmp_path, preview_methods={PreviewMethod.FULL_VAE})
    Run(engine)()
    engine.close()
    assert engine.model.preview_methods == (PreviewMethod.FULL_VAE,)
    assert list(tmp_path.iterdir()) == []


def test_decoders_are_measured_as_the_preview_thread_runs_them(tmp_path, path, monkeypatch):
    """Decoders are measured with one thread, because the time of a second thread would not be counted."""
    seen = []
    monkeypatch.setattr(HeadDecoder, "decode", lambda *_: seen.append(torch.get_num_threads()))
    build_engine("tiny", tiny.shared("sd15"), defaults=Defaults(), cache_dir=tmp_path, threads=3).close()
    assert set(seen) == {1}


def test_a_fast_device_measures_the_full_vae_at_load(tmp_path, path, monkeypatch):
    """On a GPU, where the full VAE takes a fraction of a second, the budget knows its cost before the first image."""
    monkeypatch.setattr(CpuStream, "fast", True)
    budget = PreviewBudget(0.02)
    start(tmp_path, budget=budget).close()
    assert budget.cost(PreviewMethod.FULL_VAE, 64 * 64) > budget.cost(PreviewMethod.HEAD, 64 * 64) > 0


@pytest.mark.parametrize("error", [*FAILED, *OTHER], ids=str)
def test_only_a_failed_device_ends_the_start(tmp_path, path, monkeypatch, error):
    """A decoder that fails at load is not offered, except for the full VAE; a device that fails is no such case."""
    monkeypatch.setattr(CpuStream, "fast", True)
    monkeypatch.setattr(pipeline_previews, "draw", Mock(side_effect=error))
    if error in FAILED:
        with pytest.raises(type(error)):
            start(tmp_path)
        return
    engine = start(tmp_path)
    assert engine.model.preview_methods == (PreviewMethod.FULL_VAE,)
    engine.close()


def test_the_budget_gets_the_costs_of_decoders(tmp_path, path):
    """The head is measured at load; the full VAE, which may be slow, at the end of the first generation."""
    budget = PreviewBudget(0.02)
    engine = start(tmp_path, budget=budget)
    assert budget.cost(PreviewMethod.HEAD, 64 * 64) > 0
    assert budget.cost(PreviewMethod.FULL_VAE, 64 * 64) is None
    Run(engine)()
    engine.close()
    assert budget.cost(PreviewMethod.FULL_VAE, 64 * 64) > 0
    assert budget.stride(PreviewMethod.HEAD, 64 * 64) >= 1
