"""The Python examples, run as documented, against a live server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import calotype
from calotype.testing import FakeServer
from calotype.v1 import calotype_pb2 as v1

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.process import ServerProcess

pytestmark = pytest.mark.e2e

EXAMPLES = Path(calotype.__file__).parents[1] / "examples"


@contextlib.contextmanager
def relay(address: str) -> Iterator[http.client.HTTPConnection]:
    """Runs the back end on a free port. Yields a connection to it."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "--port", "0", "relay:app"]
    environment = {**os.environ, "CALOTYPE_GRPC_ADDRESS": address}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            port = next(found[1] for line in process.stderr if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)) as connection:
                yield connection
        finally:
            process.kill()
            process.stderr.close()


def events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict]]:
    """Yields the server-sent events of a response as they arrive."""
    name = ""
    for line in response:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def test_relay_streams_progress_and_the_image(server: ServerProcess) -> None:
    """The relay sends progress with previews in order, then the image, and serves a page that shows them."""
    with relay(server.address) as connection:
        connection.request("GET", "/images?prompt=a+red+apple&steps=20")
        response = connection.getresponse()
        assert response.headers["content-type"].startswith("text/event-stream")
        *progress, (last, data) = events(response)
        connection.request("GET", "/")
        assert "EventSource" in connection.getresponse().read().decode()
    assert last == "image"
    assert data["image"].startswith("data:image/png;base64,")
    assert {name for name, _ in progress} == {"progress"}
    steps = [event["step"] for _, event in progress]
    assert steps == sorted(steps)
    assert steps[-1] == 20
    previews = [event["preview"] for _, event in progress if "preview" in event]
    assert len(previews) >= 5
    assert all(preview.startswith("data:image/jpeg;base64,") for preview in previews)


def test_relay_returns_422_with_every_violation(server: ServerProcess) -> None:
    """An invalid request gets status 422 with all violations, not a broken stream."""
    with relay(server.address) as connection:
        connection.request("GET", "/images?prompt=+&steps=0")
        response = connection.getresponse()
        assert response.status == 422
        detail = json.loads(response.read())["detail"]
    assert [violation["field"] for violation in detail] == ["prompt", "steps"]


def test_closing_the_connection_to_the_relay_cancels_the_generation(server: ServerProcess) -> None:
    """When a browser disconnects from the relay, the server cancels its generation."""
    with relay(server.address) as connection, calotype.Client(server.address) as client:
        connection.request("GET", "/images?prompt=fox&steps=150")
        response = connection.getresponse()
        assert any(event["step"] >= 2 for _, event in events(response))
        running = next(iter(client.generations())).generation_id
        response.close()
        connection.close()
        assert "outcome=CANCELLED" in server.wait_for_log("generation ended", running)


def batch(address: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    """Starts the script in a folder, with its output in a pipe."""
    command = [sys.executable, str(EXAMPLES / "batch.py"), "prompts.txt", "images", "--address", address, *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


def test_batch_resumes_after_a_kill(tmp_path: Path) -> None:
    """Generations of a killed script continue; the next run follows them by request id and skips existing files."""
    (tmp_path / "prompts.txt").write_text("a red apple\n\nfox\n")
    with FakeServer(steps=4, hold_at=2) as server:
        with batch(server.address, tmp_path) as killed, calotype.Client(server.address) as client:
            while len([each for each in client.generations() if each.step == 2]) < 2:
                pass
            killed.send_signal(signal.SIGKILL)
        server.release()
        with batch(server.address, tmp_path) as again:
            written = again.communicate(timeout=60)[0].split()
        with batch(server.address, tmp_path) as idle:
            assert idle.communicate(timeout=60)[0] == ""
    assert sorted(written) == ["images/0001.png", "images/0003.png"]
    assert (again.returncode, idle.returncode, server.cancelled) == (0, 0, [])
    assert all(request.priority == v1.PRIORITY_BATCH for request in server.requests)
    ids = [request.request_id for request in server.requests]
    assert (len(ids), len(set(ids))) == (4, 2)


def test_batch_writes_files_and_reports_failed_lines(server: ServerProcess, tmp_path: Path) -> None:
    """The script writes one file per line, reports a rejected line, continues with the others and exits with 1."""
    (tmp_path / "prompts.txt").write_text(f"a red apple\n{'very ' * 1000}long\nfox\n")
    with batch(server.address, tmp_path, "--steps", "4") as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "line 2: prompt: has 5004 characters" in output
    for name in ("0001.png", "0003.png"):
        assert (tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "images").iterdir())) == 2
