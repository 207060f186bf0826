"""Log lines of a call carry what names it: the caller's `x-request-id`, or an id drawn here, and its `traceparent`."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["bind_call"]

_TRACEPARENT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, version 00."""


def bind_call(metadata: Mapping[str, str | bytes]) -> str:
    """Lets the log lines of this task, and of the threads that work for it, carry what names the call.

    Args:
        metadata: Of a gRPC call, or the headers of a request, with names in lower case.

    Returns:
        The request id: the caller's where it is fit for a log and a header, else a new one.
    """
    given = metadata.get("x-request-id", "")
    fit = isinstance(given, str) and given.isascii() and given.isprintable() and given
    request_id = given[:64] if fit and isinstance(given, str) else secrets.token_hex(4)
    structlog.contextvars.bind_contextvars(request=request_id)
    parent = metadata.get("traceparent", "")
    if isinstance(parent, str) and _TRACEPARENT.fullmatch(parent):
        structlog.contextvars.bind_contextvars(traceparent=parent)
    return request_id
