"""Identifies the caller of a request in the middleware, before its body is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import structlog

from calotype_server.auth.access import Caller
from calotype_server.transport.net.credentials import from_scope, peer_of

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from calotype_server.auth.access import Access

__all__ = ["admit", "caller_of"]

_KEY = "calotype.caller"


def admit(access: Access, scope: Any) -> None:
    """Stores the caller of a request or WebSocket in its scope, and binds its id to the log.

    Raises:
        Unauthenticated: It has no valid key.
    """
    caller = access.authenticate(from_scope(scope), peer_of(scope))
    structlog.contextvars.bind_contextvars(caller=caller.id)
    scope[_KEY] = caller


def caller_of(connection: HTTPConnection) -> Caller:
    """Returns the caller that `admit` stored."""
    return cast(Caller, connection.scope[_KEY])
