"""Runs `calotype serve` and `calotype bridge` as separate processes, the way an operator starts them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CALOTYPE = [sys.executable, "-m", "calotype"]


def free_address() -> str:
    """Returns a free address, for a server that restarts on the same port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class ServerProcess:
    """A context manager that runs `calotype serve` on free ports and stops it at the end.

    Args:
        options: Additional flags.
        ready: Whether to wait until the server accepts requests.
        environment: Additional environment variables.
    """

    cache_dir: ClassVar[Path | None] = None
    """The cache folder of servers that are started without `--cache-dir`; by default that of the user."""
    calotype: Sequence[str] = CALOTYPE
    command: Sequence[str] = ("serve", "--grpc-address", "127.0.0.1:0")

    def __init__(self, *options: str, ready: bool = True, **environment: str) -> None:
        self._command = [*self.calotype, *self.command, "--web-address", "127.0.0.1:0", *options]
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        if self.cache_dir is not None:
            self._environment.setdefault("CALOTYPE_CACHE_DIR", str(self.cache_dir))
        self.address = ""
        self.web_address = ""
        self._ready = ready
        self.log: list[str] = []
        self._logged = threading.Condition()

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready:
            return self
        for line in self.process.stdout:
            if found := re.search(r"gRPC +(\S+)", line):
                self.address = found[1]
            if found := re.search(r"page +https?://(\S+)", line):
                self.web_address = found[1]
            if "Ctrl-C" in line:
                return self
        self._reader.join(10)
        raise AssertionError("the server did not start:\n" + "".join(self.log))

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        self.process.stdout.close()
        self.process.stderr.close()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._logged:
                self.log.append(re.sub(r"\x1b\[[0-9;]*m", "", line))
                self._logged.notify_all()

    def wait_for_log(self, *words: str, timeout: float = 60) -> str:
        """Waits for a line that contains all the words, and returns the first one."""

        def find() -> str | None:
            return next((line for line in self.log if all(word in line for word in words)), None)

        with self._logged:
            assert self._logged.wait_for(find, timeout), f"no line with {words} in:\n{''.join(self.log)}"
            return find()

    def join_log(self) -> None:
        """Waits until all lines of a process that has ended are in `log`."""
        self._reader.join(10)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def freeze(self) -> None:
        """Suspends the process: its connections stay open, but it does not respond."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resumes the process."""
        self.process.send_signal(signal.SIGCONT)


class FailingServerProcess(ServerProcess):
    """Runs `calotype serve` with faults.

    Args:
        faults: Arguments of `support.faults.server`.
        options: Additional flags of the server.
        ready: Whether to wait until the server accepts requests.
        environment: Additional environment variables.
    """

    def __init__(self, faults: Sequence[str], *options: str, ready: bool = True, **environment: str) -> None:
        self.calotype = [sys.executable, "-m", "support.faults.server", *faults, "--"]
        super().__init__(*options, ready=ready, PYTHONPATH=os.pathsep.join(sys.path), **environment)


class BridgeProcess(ServerProcess):
    """Runs `calotype bridge` on a free port."""

    command = ("bridge",)
