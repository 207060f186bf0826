"""File descriptors: every connection takes one, and many systems give a process 1024 unless it asks for more."""

from __future__ import annotations

import resource

import structlog

__all__ = ["raise_open_file_limit"]

_log = structlog.get_logger(__name__)

_OTHERS = 128
"""For files, threads' pipes, and connections that are about to be refused."""


def raise_open_file_limit(connections: int) -> None:
    """Lets this process open as many sockets, as far as the system allows; a warning says when that is too few.

    Args:
        connections: On all ports together.
    """
    needed = connections + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    possible = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < needed:
        _log.warning("fewer files may be open than there may be connections", needed=needed, allowed=possible)
