"""Stops a gRPC server from accepting connections while it continues to serve the open ones.

gRPC itself only does both at once: `Server.stop` refuses connections and cancels every call that is on its way.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["listening_on", "refuse_connections"]

_OPEN_FILES = "/dev/fd"


def listening_on(port: int) -> frozenset[int]:
    """Returns the file descriptors of this process that listen on a TCP port. Empty where they cannot be listed."""
    try:
        numbers = [int(name) for name in os.listdir(_OPEN_FILES)]
    except OSError:
        return frozenset()
    return frozenset(number for number in numbers if _listens(number, port))


def refuse_connections(listeners: Iterable[int]) -> None:
    """Closes the port behind file descriptors that belong to gRPC, which remain valid.

    On Linux, clients that connect are then refused. Other systems may continue to listen.
    """
    for number in listeners:
        with contextlib.suppress(OSError), _borrowed(number) as listener:
            listener.shutdown(socket.SHUT_RDWR)


def _listens(number: int, port: int) -> bool:
    try:
        with _borrowed(number) as found:
            return (
                found.family in (socket.AF_INET, socket.AF_INET6)
                and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
                and found.getsockname()[1] == port
            )
    except OSError:
        return False


@contextlib.contextmanager
def _borrowed(number: int) -> Iterator[socket.socket]:
    """Yields a socket for a duplicate of a file descriptor, and closes only the duplicate.

    Raises:
        OSError: The file descriptor is closed, or is not a socket.
    """
    duplicate = os.dup(number)
    try:
        borrowed = socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise
    with borrowed:
        yield borrowed
