"""Reads the API key and the peer address from calls and requests of each transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.auth.access import bearer_in_subprotocols
from calotype_server.transport.net.peers import canonical_peer, peer_name
from calotype_server.transport.net.proxies import FORWARDED_FOR, NO_PROXIES, TrustedProxies

if TYPE_CHECKING:
    from collections.abc import Iterable

    import grpc.aio

__all__ = ["from_metadata", "from_scope", "peer_of", "peer_of_call"]

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
    """Returns the canonical peer of an ASGI request, as `peer_of_call` does for gRPC.

    The web port has replaced `client` by the client behind a trusted proxy, see `ClientAddressMiddleware`.
    """
    host, port = (scope.get("client") or ("", 0))[:2]
    return peer_name(host, port)


def peer_of_call(context: grpc.aio.ServicerContext[Any, Any], proxies: TrustedProxies = NO_PROXIES) -> str:
    """Returns the canonical peer of a gRPC call: the client behind a trusted proxy, or the end of the connection."""
    forwarded_for = [str(value) for key, value in context.invocation_metadata() or () if key == FORWARDED_FOR]
    return proxies.client_of(canonical_peer(context.peer()), forwarded_for)


def _single(values: list[str]) -> str | None:
    return values[0] if len(values) == 1 else "" if values else None
