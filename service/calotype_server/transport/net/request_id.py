"""Log lines of a call carry its id, the caller's or one drawn here, and the caller's span if it has one."""

from __future__ import annotations

import re
import secrets

import structlog

__all__ = ["bind_request_id", "bind_traceparent"]

_TRACEPARENT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, version 00."""


def bind_request_id(given: object) -> str:
    """Binds what came as `x-request-id` to the log, where it is fit for that, else a new id; returns which."""
    fit = isinstance(given, str) and given.isascii() and given.isprintable() and given
    request_id = given[:64] if fit and isinstance(given, str) else secrets.token_hex(4)
    structlog.contextvars.bind_contextvars(request=request_id)
    return request_id


def bind_traceparent(given: object) -> None:
    """Binds what came as `traceparent` to the log, if it is one; whoever traces this task finds it there."""
    if isinstance(given, str) and _TRACEPARENT.fullmatch(given):
        structlog.contextvars.bind_contextvars(traceparent=given)
