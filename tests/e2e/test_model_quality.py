"""The bundled model draws what it is told to: a few of the names that `make evaluate-model` draws two hundred of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calotype_bundled_model import PATH

pytestmark = pytest.mark.e2e

EVALUATE = Path(__file__).parents[2] / "service/bundled_model/recipe/evaluate.py"


def test_names_are_drawn_as_named(tmp_path: Path) -> None:
    """Of twelve names all but two give the nearest picture, the autoencoder is faithful, and the folder is small."""
    output = tmp_path / "model.json"
    command = [sys.executable, str(EVALUATE), "--model", str(PATH), "--output", str(output), "--names", "12"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100)
    figures = json.loads(output.read_text())
    assert figures["top1"] >= 10 / 12
    assert figures["psnr"] >= 28
    assert figures["megabytes"] < 100


def test_weights_are_safetensors_and_licences_come_along() -> None:
    """Nothing in the folder can run code, and everything in it may be passed on."""
    suffixes = {path.suffix for path in PATH.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".txt"}
    assert len(list((PATH / "LICENSES").iterdir())) == 3
