"""The Dockerfile and the systemd unit, checked without Docker and without systemd running."""

from __future__ import annotations

import configparser
import http.server
import importlib.metadata
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from calotype_server.apps import signals
from calotype_server.settings import Settings

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service"
DOCKERFILE = SERVICE / "Dockerfile"
UNIT = SERVICE / "calotype.service"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command and captures its output."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment or None)


def unit() -> dict[str, str]:
    """Returns the keys of the unit; the last value of repeated keys."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]  # the documented way to keep upper case
    parser.read(UNIT)
    return {key: value for section in parser.sections() for key, value in parser[section].items()}


def instructions() -> list[tuple[str, str]]:
    """Returns the name and arguments of each instruction of the Dockerfile, without comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_passes_hadolint() -> None:
    """The Dockerfile follows all rules of hadolint."""
    done = run(Path(sys.executable).parent / "hadolint", DOCKERFILE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_is_small_unprivileged_and_without_secrets() -> None:
    """The image has two stages, an unprivileged user, pinned packages and a health check; no key, no `--insecure`."""
    made = instructions()
    assert [name for name, _ in made].count("FROM") == 2
    last = made[max(index for index, (name, _) in enumerate(made) if name == "FROM") :]
    assert ("USER", "10001") in last
    assert any(name == "HEALTHCHECK" and "healthcheck.py" in words for name, words in last)
    assert ("STOPSIGNAL", "SIGTERM") in last
    for _, words in made:
        assert "pip install" not in words or "--constraint" in words or "constraints.txt" in words
        assert not re.search(r"API_KEYS|TLS_KEY|INSECURE|TOKEN", words)
    # Every variable that the image sets is a setting.
    variables = re.findall(r"CALOTYPE_(\w+)=", " ".join(words for name, words in last if name == "ENV"))
    assert {name.lower() for name in variables} <= set(Settings.model_fields)


def test_no_installed_package_has_the_vulnerabilities_of_urllib3_1() -> None:
    """Both `make` and the image install the versions of overrides.txt last, although sonora asks for an older one."""
    overrides = (ROOT / "overrides.txt").read_text()
    assert f"urllib3=={importlib.metadata.version('urllib3')}" in overrides
    [*_, last] = [words for name, words in instructions() if "pip install" in words]
    assert last.endswith("pip install --no-deps --requirement overrides.txt")


def test_all_copied_files_are_in_the_build_context() -> None:
    """Every copied file exists and is not ignored; all other files are ignored."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for name, words in instructions():
        if name == "COPY" and not words.startswith("--from"):
            for source in words.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(line.startswith("!") and source.startswith(line[1:]) for line in ignored), source


def test_systemd_accepts_the_unit() -> None:
    """systemd-analyze only reports that the service is not installed on this machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed; it comes with systemd")
    found = run("systemd-analyze", "verify", UNIT)
    complaints = (found.stdout + found.stderr).splitlines()
    assert [line for line in complaints if "is not executable" not in line] == []


def test_the_unit_is_hardened() -> None:
    """The exposure of the service, rated by systemd from 0 to 10, is at most 2."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed; it comes with systemd")
    done = run("systemd-analyze", "security", "--offline=true", "--threshold=20", UNIT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit_gives_time_to_drain() -> None:
    """The unit sends SIGTERM, waits longer than the server may take by default, and restarts it after a failure."""
    keys = unit()
    assert int(keys["TimeoutStopSec"]) > Settings.model_fields["drain_seconds"].default + signals._STOP_SECONDS
    assert (keys["KillSignal"], keys["Restart"]) == ("SIGTERM", "on-failure")
    # More than the connections of two full ports.
    assert int(keys["LimitNOFILE"]) > 2 * Settings.model_fields["max_connections"].default
    variables = re.findall(r"CALOTYPE_(\w+)=", UNIT.read_text().split("[Service]")[1])
    assert {name.lower() for name in variables} <= set(Settings.model_fields)


def test_grpc_logs_no_failed_handshakes() -> None:
    """The image and the unit silence gRPC's core, whose log any stranger could flood."""
    assert "GRPC_VERBOSITY=NONE" in UNIT.read_text()
    assert any(name == "ENV" and "GRPC_VERBOSITY=NONE" in words for name, words in instructions())


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_reports_readiness(status: int, code: int) -> None:
    """The exit code is 0 if the server is ready, and 1 if it is not ready or cannot be reached."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"0.0.0.0:{server.server_port}"
        done = run(sys.executable, SERVICE / "healthcheck.py", CALOTYPE_WEB_ADDRESS=address)
        probed = run(
            *(sys.executable, SERVICE / "healthcheck.py"),
            CALOTYPE_WEB_ADDRESS="0.0.0.0:1",
            CALOTYPE_PROBE_ADDRESS=address,
            CALOTYPE_TLS_CERTIFICATE="certificate.pem",
        )
        server.shutdown()
        thread.join()
    assert done.returncode == code, done.stderr
    # The port for probes is preferred, and never uses TLS.
    assert probed.returncode == code, probed.stderr
    gone = run(sys.executable, SERVICE / "healthcheck.py", CALOTYPE_WEB_ADDRESS=address)
    assert gone.returncode == 1
    assert "Traceback" not in gone.stderr
