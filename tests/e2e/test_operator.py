"""Operators' actions: a start with wrong settings, a stop during a stream, a kill, `calotype doctor`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

import calotype
from support.process import CALOTYPE, ServerProcess

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a `calotype` command to its end."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment}
    return subprocess.run([*CALOTYPE, *arguments], capture_output=True, text=True, timeout=100, env=env, check=False)


@pytest.mark.slow
def test_sigterm_lets_the_running_generation_finish(cache_dir: Path) -> None:
    """The open stream ends with its image, new calls find the port closed, and the exit code is 0."""
    with ServerProcess("--cache-dir", str(cache_dir)) as server, calotype.Client(server.address) as client:
        generation = client.generate("a red apple", steps=60, seed=1)
        rejected = False
        for progress in generation:
            if progress.step >= 3 and not rejected:
                server.terminate()
                server.wait_for_log("draining")
                impatient = calotype.Client(server.address, retries=0)
                with impatient, pytest.raises(calotype.Unavailable):
                    impatient.generate("another").result()
                rejected = True
        assert rejected
        assert generation.result().width == 128
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_without_grace_the_stream_ends_typed(cache_dir: Path) -> None:
    """A generation that cannot finish ends as Unavailable with a retry delay, not as a lost connection."""
    options = ("--cache-dir", str(cache_dir), "--drain-seconds", "0")
    with ServerProcess(*options) as server, calotype.Client(server.address, retries=0) as client:
        generation = client.generate("a red apple", steps=150)
        with pytest.raises(calotype.Unavailable) as caught:
            for progress in generation:
                if progress.step >= 2:
                    server.terminate()
        assert caught.value.reason == "DRAINING"
        assert caught.value.retry_after > 0
        assert server.process.wait(30) == 0


def test_a_killed_client_frees_its_slot_and_a_killed_server_is_a_typed_error(cache_dir: Path) -> None:
    """SIGKILL of a client ends its generation; SIGKILL of the server raises Unavailable during the stream."""
    with ServerProcess("--cache-dir", str(cache_dir)) as server, calotype.Client(server.address, retries=0) as client:
        command = [*CALOTYPE, "generate", "a cat", "--address", server.address, "--steps", "150", "--json"]
        command += ["--retries", "0"]  # the client must not reconnect
        victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in victim.stdout:
            if '"denoising"' in line:
                victims_id = json.loads(line)["generation_id"]
                break
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
        client.generate("a dog", steps=2).result()
        server.wait_for_log(victims_id, "outcome=ABANDONED")
        with pytest.raises(calotype.Unavailable):
            for progress in client.generate("a cat", steps=150):
                if progress.step >= 2:
                    server.process.kill()


@pytest.mark.parametrize("moment", ["calibrating", pytest.param("model loaded", marks=pytest.mark.slow)])
def test_a_signal_while_loading_stops_the_server(tmp_path: Path, moment: str) -> None:
    """SIGTERM during the load gives exit code 0, and the server never reports that it is ready."""
    with ServerProcess("--cache-dir", str(tmp_path), ready=False) as server:
        server.wait_for_log(moment)
        server.terminate()
        assert server.process.wait(60) == 0
        assert "gRPC" not in server.process.stdout.read()


def test_a_taken_port_is_explained() -> None:
    """A port that is in use gives exit code 1 and a sentence with the flag, before any model is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--grpc-address", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 1
    assert "--grpc-address" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./no-such-folder", "no folder"),
        pytest.param("org/no-such-model", "hub cannot be reached", marks=pytest.mark.slow),
        pytest.param("nonsense", "neither a folder nor a hub id", marks=pytest.mark.slow),
    ],
)
def test_a_missing_model_is_explained(model: str, words: str) -> None:
    """Each kind of wrong model name gives exit code 1 and a specific sentence, without a traceback."""
    done = run("serve", "--grpc-address", "127.0.0.1:0", "--model", model)
    assert done.returncode == 1
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_wrong_settings_are_all_named() -> None:
    """Wrong flags and variables are all reported at once, with exit code 2."""
    done = run("serve", "--max-queue", "-1", "--dtype", "float8", CALOTYPE_PREVIEW_QUALITY="100")
    assert done.returncode == 2
    for flag in ("--max-queue", "--dtype", "--preview-quality"):
        assert flag in done.stderr


def test_the_doctor_reports_success_and_problems() -> None:
    """`calotype doctor` exits with 0 on this machine; with a missing model it explains the problem and exits with 1."""
    done = run("doctor", "--grpc-address", "127.0.0.1:0")
    assert done.returncode == 0, done.stdout
    assert "bundled: StableDiffusionPipeline" in done.stdout
    failed = run("doctor", "--grpc-address", "127.0.0.1:0", "--model", "./nowhere")
    assert failed.returncode == 1
    assert "There is no folder" in failed.stdout
