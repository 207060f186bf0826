"""Files that `calotype doctor` checks beside the model, and its output."""

import logging

import huggingface_hub
import pytest
import safetensors.torch
import structlog
import torch
import typer

from calotype_server.cli import doctor as command
from calotype_server.cli.doctor_additions import additions
from calotype_server.cli.findings import Finding
from calotype_server.settings import Settings
from support.engine import tiny
from support.engine.files.loras import save_lora


def test_added_files_are_checked(tmp_path, monkeypatch):
    """Each LoRA and embedding and the tiny VAE have a line; those that are still to be downloaded are no problem."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    pipeline = tiny.build("sd15")
    lora = save_lora(tmp_path / "lora.safetensors", pipeline)
    safetensors.torch.save_file({"a": torch.zeros(1, 16)}, tmp_path / "wide.safetensors")
    settings = Settings(
        lora=f"good={lora},bad={tmp_path}/none.safetensors,far=org/name", embedding=f"zorn={tmp_path}/wide.safetensors"
    )
    found = {each.result.split(" ", 1)[0]: each for each in additions(settings, pipeline, str(tmp_path))}
    assert found["zorn"].advice.endswith("this model's have 32 numbers each.")
    assert found["good"] == Finding(True, "lora", "good fits the model")
    assert "There is no file or folder" in found["bad"].advice
    assert found["org/name"] == Finding(True, "lora", "org/name is not in the local cache; serve will download it")
    assert not found[str(tmp_path)].ok


def test_the_report_has_no_log_lines(monkeypatch, capsys):
    """Debug and info lines of loading do not appear between the findings."""
    root, level = logging.getLogger(), logging.getLogger("calotype_server").level
    handlers, config = list(root.handlers), structlog.get_config()

    def examine(_):
        structlog.get_logger("calotype_server.engine").debug("details")
        structlog.get_logger("calotype_server.engine").info("loaded")
        yield Finding(True, "model", "fine")

    monkeypatch.setattr(command, "examine", examine)
    try:
        with pytest.raises(typer.Exit):
            command.doctor(Settings())
    finally:
        root.handlers = handlers
        logging.getLogger("calotype_server").setLevel(level)
        structlog.configure(**config)
        logging.captureWarnings(False)
    done = capsys.readouterr()
    assert done.out.count("\n") == 1
    assert not done.err
