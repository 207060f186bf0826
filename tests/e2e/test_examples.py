"""The example clients in other languages, generated from the current proto, against a running service."""

from __future__ import annotations

import io
import random
import re
import signal
from typing import TYPE_CHECKING

import pytest
from PIL import Image as Pillow

import calotype
from calotype.testing import FakeServer
from support.examples import EXAMPLES, Example

if TYPE_CHECKING:
    from pathlib import Path

    from support.process import ServerProcess

# The first test of each builds it.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PATIENCE = 100
"""Seconds that a client may take."""


SLOW_TO_BUILD = ("cpp", "go", "java")
PARAMETERS = [
    pytest.param(each, id=name, marks=[pytest.mark.slow] if name in SLOW_TO_BUILD else [])
    for name, each in EXAMPLES.items()
]


@pytest.fixture(params=PARAMETERS, scope="module")
def example(request: pytest.FixtureRequest) -> Example:
    """Each example client, built."""
    request.param.build()
    return request.param


def run(example: Example, folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Runs a client to its end; returns the exit code, the lines of the output, and the errors."""
    with example.start(folder, *arguments) as process:
        out, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, out.splitlines(), errors


@pytest.mark.proves("{example}", "streams")
def test_an_image_streams(example: Example, server: ServerProcess, tmp_path: Path) -> None:
    """The client prints phases and steps in order, and saves complete previews and the final image."""
    code, lines, errors = run(example, tmp_path, server.address, "a red apple")
    assert code == 0, errors
    phases = list(dict.fromkeys(line.split()[0] for line in lines))
    assert phases == ["PHASE_" + name for name in ("QUEUED", "ENCODING_PROMPT", "DENOISING", "DECODING", "SUCCEEDED")]
    assert lines[-1] == "PHASE_SUCCEEDED 20/20"
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps == sorted(steps)
    previews = list(tmp_path.glob("preview-*.jpg"))
    assert len(previews) >= 5
    for file, kind in [*((preview, "JPEG") for preview in previews), (tmp_path / "final.png", "PNG")]:
        with Pillow.open(file) as picture:
            picture.load()
            assert picture.format == kind
    assert picture.size == (128, 128)


@pytest.mark.proves("{example}", "cancels")
def test_ctrl_c_frees_the_slot(example: Example, server: ServerProcess, tmp_path: Path) -> None:
    """SIGINT during the stream ends the generation on the server, and the program with exit code 130."""
    with calotype.Client(server.address) as client, example.start(tmp_path, server.address, "fox", "150") as process:
        # A slow reader does not see every step.
        assert any(re.match(r"PHASE_DENOISING ([2-9]|\d\d+)/150", line) for line in process.stdout)
        running = next(iter(client.generations())).generation_id
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
        outcome = server.wait_for_log("generation ended", running)
        assert "outcome=ABANDONED" in outcome or "outcome=CANCELLED" in outcome
        client.generate("a cat", steps=1).result()
    assert process.returncode == 130
    assert not (tmp_path / "final.png").exists()


@pytest.mark.proves("{example}", "errors")
def test_every_violation_is_printed(example: Example, server: ServerProcess, tmp_path: Path) -> None:
    """The client decodes the details of a rejected request and prints one line for each field."""
    code, lines, errors = run(example, tmp_path, server.address, "", "0")
    assert (code, lines) == (1, [])
    assert "  prompt: must not be empty\n" in errors
    assert "  step_count: is 0, must be 1 to 150\n" in errors


@pytest.mark.proves("{example}", "streams")
def test_chunks_are_joined(example: Example, tmp_path: Path) -> None:
    """A final image that is larger than a message arrives byte for byte."""
    noise, file = random.Random(1), io.BytesIO()
    Pillow.frombytes("RGB", (1500, 1500), noise.randbytes(1500 * 1500 * 3)).save(file, "PNG")
    image = calotype.Image(file.getvalue(), "png", 1500, 1500)
    assert len(image.data) > 2 * 3 * 2**20
    with FakeServer(image=image, chunk_bytes=3 * 2**20) as server:
        code, _, errors = run(example, tmp_path, server.address)
    assert code == 0, errors
    assert (tmp_path / "final.png").read_bytes() == image.data
