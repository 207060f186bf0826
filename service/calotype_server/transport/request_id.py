"""Log lines of a call carry its id: the caller's, or one drawn here."""

from __future__ import annotations

import secrets

import structlog

__all__ = ["bind_request_id"]


def bind_request_id(given: object) -> str:
    """Binds what came as `x-request-id` to the log, where it is fit for that, else a new id; returns which."""
    fit = isinstance(given, str) and given.isascii() and given.isprintable() and given
    request_id = given[:64] if fit and isinstance(given, str) else secrets.token_hex(4)
    structlog.contextvars.bind_contextvars(request=request_id)
    return request_id
