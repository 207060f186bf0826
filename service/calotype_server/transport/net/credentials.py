"""Reads the API key and the peer address from calls and requests of each transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.auth.access import bearer_in_subprotocols

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["from_metadata", "from_scope", "peer_of"]

_HEADER = "authorization"


def from_metadata(metadata: Iterable[Any] | None) -> str | None:
    """Returns the `authorization` of a gRPC call, None if there is none, or "" (never valid) if there are several."""
    return _single([value for key, value in metadata or () if key == _HEADER])


def from_scope(scope: Any) -> str | None:
    """Returns the `authorization` of an ASGI request, as `from_metadata` does.

    It is a header or, for a WebSocket, a header or a subprotocol.
    """
    found = _single([value.decode("latin-1") for key, value in scope["headers"] if key == _HEADER.encode()])
    if found is None and scope["type"] == "websocket":
        return bearer_in_subprotocols(scope.get("subprotocols", ()))
    return found


def peer_of(scope: Any) -> str:
    """Returns the address of an ASGI client in gRPC's notation, so that a host is the same caller on every port."""
    client = scope.get("client")
    if client is None:
        return "unknown:"
    host, port = client[:2]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def _single(values: list[str]) -> str | None:
    return values[0] if len(values) == 1 else "" if values else None
