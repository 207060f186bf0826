"""Raises the limit on open files: every connection uses one, and many systems allow 1024 per process by default."""

from __future__ import annotations

import resource

import structlog

__all__ = ["raise_open_file_limit"]

_log = structlog.get_logger(__name__)

_RESERVE = 128
"""Open files that are not connections: regular files, pipes, and connections that are about to be rejected."""


def raise_open_file_limit(connections: int) -> None:
    """Raises this process's limit on open files up to the system's maximum; logs a warning if that is too low.

    Args:
        connections: Largest number of connections on all ports together.
    """
    needed = connections + _RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        _log.warning("the open file limit is too low for max_connections", needed=needed, allowed=allowed)
