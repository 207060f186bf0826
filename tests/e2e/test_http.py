"""Runs the examples of service/HTTP.md against the real service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PAGE = Path(__file__).parents[2].joinpath("service/HTTP.md").read_text("utf-8")


def examples(language: str) -> list[str]:
    """Returns the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A server process with the bundled model."""
    with ServerProcess("--log-level", "warning") as server:
        yield server


def run(server: ServerProcess, folder: Path, *command: str) -> str:
    """Runs an example and returns what it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (command, done.stdout[-500:], done.stderr[-2000:], server.log)
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("example", examples("sh"))
def test_curl(server: ServerProcess, tmp_path: Path, example: str) -> None:
    """Every command succeeds, and every stream ends with its image."""
    text = example.replace("127.0.0.1:8080", server.web_address)
    printed = run(server, tmp_path, "bash", "-euo", "pipefail", "-c", text)
    if "-sfN" in example and "generations" not in example:
        assert printed.count("event: end") == example.count("-sfN")
        assert printed.count("PHASE_SUCCEEDED") == example.count("-sfN")
    if "apple.png" in example:
        assert (tmp_path / "apple.png").read_bytes().startswith(b"\x89PNG")
        assert '"request_id":"order-4711"' in printed
    if "width_px" in example:
        answer = json.loads(printed)
        assert [each["field"] for each in answer["error"]["violations"]] == ["seed", "prompt", "width_px"]


@pytest.mark.parametrize("example", examples("python"))
def test_python(server: ServerProcess, tmp_path: Path, example: str) -> None:
    """The example with OpenAI's SDK writes its image file."""
    run(server, tmp_path, sys.executable, "-c", example.replace("127.0.0.1:8080", server.web_address))
    assert (tmp_path / "apple.png").read_bytes().startswith(b"\x89PNG")
