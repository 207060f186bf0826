"""Keeps log lines and typed keys from overwriting the live view in the terminal."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

__all__ = ["quiet_core", "quiet_keyboard"]


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Switches echo off, because typed keys and answers of the terminal would appear in the live view."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    during = termios.tcgetattr(sys.stdin)
    during[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, during)
    try:
        yield
    finally:
        # TCSAFLUSH discards a late answer of the terminal, which the shell would read as typed text.
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)


@contextmanager
def quiet_core() -> Iterator[TextIO]:
    """Silences gRPC's C core, which writes to file descriptor 2 and not to `sys.stderr`.

    Yields:
        The stream for messages during the block.
    """
    if "GRPC_VERBOSITY" in os.environ:  # the user wants to see its log
        yield sys.stderr
        return
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with open(stderr, "w", encoding="utf-8", closefd=False) as stream:
            yield stream if sys.stderr is sys.__stderr__ else sys.stderr
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
