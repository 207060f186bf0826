"""The bundled model draws its prompts: a short version of `make evaluate-model` with twelve names."""

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


@pytest.mark.slow
def test_names_are_drawn_as_named(tmp_path: Path) -> None:
    """At least ten of twelve names give the right image, the autoencoder has 28 dB, and the folder is below 100 MB."""
    output = tmp_path / "model.json"
    command = [sys.executable, str(EVALUATE), "--model", str(PATH), "--output", str(output), "--names", "12"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100)
    figures = json.loads(output.read_text())
    assert figures["top1"] >= 10 / 12
    assert figures["psnr"] >= 28
    assert figures["megabytes"] < 100


def test_the_folder_has_only_safetensors_and_all_licences() -> None:
    """No file in the folder can run code, and the licences of all parts are included."""
    suffixes = {path.suffix for path in PATH.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".txt"}
    assert len(list((PATH / "LICENSES").iterdir())) == 3
