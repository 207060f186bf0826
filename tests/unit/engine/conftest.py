"""Tiny pipelines for the tests of the engine. None of them reaches for the network."""

import functools
import shutil

import huggingface_hub
import pytest
import structlog
import torch
import transformers

from calotype_server.engine.preview import pipeline_previews
from calotype_server.engine.preview.calibrate import calibrate
from support.engine import tiny
from support.engine.schedulers import schedulers_examined_once


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from more threads, and one thread always sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _schedulers_examined_once():
    """Examines the schedulers of each config once."""
    with schedulers_examined_once():
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick_calibration():
    """Fits preview heads to 4 images instead of 24, in every engine that a test or a module's fixture starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_previews, "calibrate", functools.partial(calibrate, budget=0.0))
        yield


@pytest.fixture
def logs():
    """The log entries of the code under test."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture(scope="session")
def sd15():
    """The shared tiny SD1.5, which no test may change."""
    return tiny.shared("sd15")


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory):
    """A diffusers folder as `--model` takes it, with the tiny SD1.5 in it; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd15"
    tiny.build("sd15").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    """The folder of a tiny FLUX with CLIP and T5."""
    pipeline = tiny.build("flux")
    config = transformers.T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    clip = tiny.shared("sd15")
    pipeline.register_modules(
        text_encoder=clip.text_encoder,
        text_encoder_2=transformers.T5EncoderModel(config),
        tokenizer=clip.tokenizer,
        tokenizer_2=clip.tokenizer,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sd15_folder, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(sd15_folder, tmp_path / "model")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Disables the network and empties the hub's cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
