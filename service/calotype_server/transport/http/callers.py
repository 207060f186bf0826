"""Whose request it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server.transport.address import peer

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

__all__ = ["caller_of"]


def caller_of(connection: HTTPConnection) -> str:
    """Returns who sends a request or opens a WebSocket: the peer's host, as for calls over gRPC."""
    return peer(connection.scope).rpartition(":")[0]
