"""The parent's handle of the process that has the device: if that process dies or hangs, the results are safe here."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

__all__ = ["CommandFailed", "HostDied", "HostProcess"]

_EXIT_SECONDS = 20.0
"""Time for a process to stop its servers."""


class CommandFailed(Exception):
    """The command raised; the message has its error."""


class HostDied(Exception):
    """The process ended or did not answer in time. It no longer runs."""


def _main(connection: Connection, *arguments: Any) -> None:
    # Only this process imports torch.
    from benchmarks.gpu import host

    host.main(connection, *arguments)


class HostProcess:
    """Starts the process; call it with the name of a command in `host` or `serving` and its arguments.

    Args:
        family: Model family.
        folder: For the log and the servers' caches.
        toy: Whether the modules are tiny.
        device: Torch device, or None for the server's choice.
        dtype: Number format, or None for the server's choice.
    """

    def __init__(
        self, family: str, folder: Path, *, toy: bool, device: str | None = None, dtype: str | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, family, toy, device, dtype, folder), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, command: str, *arguments: Any, timeout: float = 600, **options: Any) -> Any:
        """Executes a command and returns its result.

        Raises:
            CommandFailed: It raised.
            HostDied: The process died, or the command took longer than `timeout` seconds and the process was killed.
        """
        try:
            self._connection.send((command, arguments, options))
            answered = self._connection.poll(timeout)
            succeeded, answer = self._connection.recv() if answered else (False, None)
        except (EOFError, OSError) as error:
            self._kill()
            raise HostDied(f"the process ended during {command}, exit code {self._process.exitcode}") from error
        if not answered:
            self._kill()
            raise HostDied(f"{command} took longer than {timeout:.0f} s")
        if not succeeded:
            raise CommandFailed(answer)
        return answer

    def close(self) -> None:
        """Ends the process, by force if it does not end by itself."""
        self._connection.close()
        self._process.join(_EXIT_SECONDS)
        self._kill()

    def _kill(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()
