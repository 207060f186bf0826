"""The factory of engines; `test_tiny_vae.TestServing` covers what it builds."""

import json
import subprocess
import sys

import pytest

from calotype_server import errors
from calotype_server.engine import factory, loading
from calotype_server.engine.requests import trial
from calotype_server.observability.events import ignore
from calotype_server.settings import Settings
from calotype_server.types import OtherSizes
from support.engine.device_errors import EXHAUSTED, FAILED
from support.engine.files.loras import save_lora


def test_importing_the_factory_does_not_import_torch():
    """Importing torch takes seconds, so it happens only when an engine is loaded."""
    check = "import calotype_server.engine.factory, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("error", "message"), [(FAILED[0], "The device cpu failed"), (EXHAUSTED[0], "memory of cpu does not suffice")]
)
def test_the_operator_learns_that_the_device_failed(monkeypatch, error, message):
    """A failure of the device while the model is measured is not blamed on the model."""

    def fail(*_):
        raise error

    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: None)
    monkeypatch.setattr(trial, "check_draws", lambda *_: None)
    monkeypatch.setattr(factory, "engine_around", fail)
    with pytest.raises(errors.ModelUnavailable, match=message):
        factory.load_engine(Settings(device="cpu"), ignore)


def test_the_folder_and_the_setting_decide_the_sizes(folder, tmp_path):
    """`calotype.json` names the supported sizes, and `--other-sizes` says what happens with the others."""
    (folder / "calotype.json").write_text(json.dumps({"sizes": [[64, 64]]}))

    def model(mode):
        settings = Settings(model=str(folder), device="cpu", threads=1, cache_dir=tmp_path, other_sizes=mode)
        engine = factory.load_engine(settings, ignore)
        engine.close()
        return engine.model

    found = {mode: model(mode) for mode in OtherSizes}
    assert {model.sizes for model in found.values()} == {((64, 64),)}
    assert [mode for mode in found if found[mode].supports_size(72, 64)] == [OtherSizes.DRAW]
    assert [mode for mode in found if found[mode].scales_other_sizes] == [OtherSizes.SCALE]


def test_a_size_that_the_model_cannot_draw_is_an_error_at_start(folder, tmp_path):
    """The message names the file, the size and the pipeline."""
    (folder / "calotype.json").write_text(json.dumps({"sizes": [[60, 64]]}))
    settings = Settings(model=str(folder), device="cpu", threads=1, cache_dir=tmp_path)
    with pytest.raises(errors.ModelUnavailable, match=r"calotype\.json lists the size 60x64"):
        factory.load_engine(settings, ignore)


def test_loras_of_the_settings(sd15_folder, tmp_path, sd15):
    """The engine offers the LoRAs that the settings name; one that does not fit ends the start with its reason."""
    file = save_lora(tmp_path / "style.safetensors", sd15)
    options = {"model": str(sd15_folder), "device": "cpu", "cache_dir": tmp_path, "max_active": 1, "memory_limit": 0}
    engine = factory.load_engine(Settings(lora=f"style={file}", **options), ignore)
    try:
        assert engine.model.loras == ("style",)
    finally:
        engine.close()
    with pytest.raises(errors.ModelUnavailable, match=r"--lora style=org/style:x\.bin cannot be used"):
        factory.load_engine(Settings(lora="style=org/style:x.bin", **options), ignore)
