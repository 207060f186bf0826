"""Replaces the address of a trusted proxy by the address of the client behind it, for everything on the web port."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.transport.net.credentials import peer_of
from calotype_server.transport.net.peers import host_of
from calotype_server.transport.net.proxies import FORWARDED_FOR

if TYPE_CHECKING:
    from calotype_server.transport.net.proxies import TrustedProxies

__all__ = ["ClientAddressMiddleware"]


class ClientAddressMiddleware:
    """An ASGI middleware that sets `client` and `scheme` of requests which come through a trusted proxy.

    uvicorn has the same, but only for its own port, and it trusts every proxy on this machine by default.

    Args:
        application: The app inside.
        proxies: Trusted to send a correct `X-Forwarded-For` and `X-Forwarded-Proto`.
    """

    def __init__(self, application: Any, proxies: TrustedProxies) -> None:
        self._application = application
        self._proxies = proxies

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on."""
        if self._proxies.trusts(peer := peer_of(scope)):
            client = self._proxies.client_of(peer, _values(scope, FORWARDED_FOR))
            scheme = (_values(scope, "x-forwarded-proto") or [""])[-1]
            scope = {**scope, "client": (host_of(client), 0)}
            if scheme in ("http", "https"):
                scope["scheme"] = scheme.replace("http", "ws") if scope["type"] == "websocket" else scheme
        await self._application(scope, receive, send)


def _values(scope: Any, header: str) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == header.encode()]
