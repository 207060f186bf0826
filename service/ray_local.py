"""Runs Calotype on a local Ray cluster that only this machine can reach: `make ray-up`, `make ray-down`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml

HERE = Path(__file__).parent
STATE = HERE.parent / "build" / "ray"
HOST = "127.0.0.1"
GCS_PORT, DASHBOARD_PORT = 6385, 8265
# Ports that Ray itself uses, and the other program that is likely to use each.
PORTS = {GCS_PORT: "another Ray", DASHBOARD_PORT: "another Ray", 8404: "another HAProxy", 9101: "another HAProxy"}
START_SECONDS = 300.0
STOP_SECONDS = 30.0


def main() -> int:
    """Runs the action given on the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("--config", type=Path, default=HERE / "ray.yaml")
    options = parser.parse_args()
    return up(options.config) if options.action == "up" else down()


def environment() -> dict[str, str]:
    """Returns this process's environment and the variables of ray.env; the environment has precedence."""
    lines = (HERE / "ray.env").read_text().splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    addresses = {"RAY_ADDRESS": f"{HOST}:{GCS_PORT}", "RAY_DASHBOARD_ADDRESS": f"http://{HOST}:{DASHBOARD_PORT}"}
    return {**{name: value for name, _, value in pairs}, **addresses, **os.environ}


def up(config: Path) -> int:
    """Starts Ray and the application, waits until every replica is ready, and returns the exit code."""
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        return _fail("Ray is not installed in this environment: pip install 'calotype[ray]'.")
    if _pid() is not None:
        return _fail("Calotype on Ray is already running: `make ray-down` stops it.")
    settings = yaml.safe_load(config.read_text())
    address = f"{HOST}:{settings['grpc_options']['port']}"
    application_ports = {settings[kind]["port"]: "`calotype serve`" for kind in ("grpc_options", "http_options")}
    for port, other in {**application_ports, **PORTS}.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                return _fail(f"Port {port} is in use. Is {other} running?")
    STATE.mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [ray, "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={HOST}", f"--port={GCS_PORT}"]
    command += [f"--dashboard-host={HOST}", f"--dashboard-port={DASHBOARD_PORT}"]
    with (STATE / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment()
        )
    (STATE / "pid").write_text(str(process.pid))
    try:
        _wait_for_ray(process)
        subprocess.run([ray.with_name("serve"), "deploy", str(config)], check=True, env=environment())
        replicas = _wait_for_replicas(process)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"ray: {error} Ray's logs: {STATE / 'ray.log'}, /tmp/ray/session_latest/logs/serve", file=sys.stderr)
        down()
        return 1
    print(
        f"""
  Calotype serves on Ray, {replicas} replicas

  gRPC       {address}
  dashboard  http://{HOST}:{DASHBOARD_PORT}
  try        calotype generate "a red apple" -o apple.png
  browsers   calotype bridge --upstream {address}
  stop       make ray-down
"""
    )
    return 0


def down() -> int:
    """Stops the processes that `up` started, and returns the exit code."""
    pid = _pid()
    if pid is None:
        print("Calotype on Ray is not running.")
        return 0
    descendants = _descendants(pid)
    _kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while (left := [each for each in (pid, *descendants) if _is_alive(each)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for each in left:
        _kill(each, signal.SIGKILL)
    (STATE / "pid").unlink(missing_ok=True)
    return 0


def applications() -> dict[str, dict]:
    """Returns Serve's status of each application; empty while Serve does not respond."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{DASHBOARD_PORT}/api/serve/applications/", timeout=10) as response:
            return json.load(response).get("applications", {})
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return {}


def _wait_for_ray(process: subprocess.Popen[bytes]) -> None:
    for _ in _poll(process):
        try:
            urllib.request.urlopen(f"http://{HOST}:{DASHBOARD_PORT}/api/serve/applications/", timeout=10).close()
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            continue
        return
    raise RuntimeError(f"Ray did not start within {START_SECONDS:.0f} s.")


def _wait_for_replicas(process: subprocess.Popen[bytes]) -> int:
    """Waits until the application runs, and returns its number of replicas."""
    for _ in _poll(process):
        for application in applications().values():
            if application["status"] == "DEPLOY_FAILED":
                raise RuntimeError(f"The application failed to start: {application['message']}")
            if application["status"] == "RUNNING":
                return sum(len(each["replicas"]) for each in application["deployments"].values())
    raise RuntimeError(f"The replicas were not ready within {START_SECONDS:.0f} s.")


def _poll(process: subprocess.Popen[bytes]):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"Ray exited with code {process.returncode}.")
        yield
        time.sleep(0.5)


def _pid() -> int | None:
    try:
        pid = int((STATE / "pid").read_text())
    except (OSError, ValueError):
        return None
    try:
        is_ours = b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        is_ours = False
    return pid if is_ours else None


def _descendants(pid: int) -> list[int]:
    """Returns the children of a process, their children and so on, because some of them survive its end."""
    found = []
    for path in Path("/proc").glob("[0-9]*/task/*/children"):
        if path.parts[2] == str(pid):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _fail(text: str) -> int:
    print(f"ray: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
