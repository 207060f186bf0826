"""Binds a call's request id and trace context to its log lines."""

from __future__ import annotations

import re
import secrets

import structlog

__all__ = ["bind_request_id", "bind_traceparent"]

_MAX_CHARS = 64

_TRACEPARENT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, version 00."""


def bind_request_id(given: object) -> str:
    """Binds a request id to the log and returns it.

    Args:
        given: The value of `x-request-id`. Used, cut to 64 characters, if it is printable ASCII; otherwise a new id.
    """
    if isinstance(given, str) and given and given.isascii() and given.isprintable():
        request_id = given[:_MAX_CHARS]
    else:
        request_id = secrets.token_hex(4)
    structlog.contextvars.bind_contextvars(request=request_id)
    return request_id


def bind_traceparent(given: object) -> None:
    """Binds the value of `traceparent` to the log if it is valid; the tracer reads it from there."""
    if isinstance(given, str) and _TRACEPARENT.fullmatch(given):
        structlog.contextvars.bind_contextvars(traceparent=given)
