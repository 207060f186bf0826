"""Restricts which web pages may call the web port, and under which host names it answers.

Any web page can make its visitor's browser send requests to addresses that only this browser can reach, such as
127.0.0.1. Two headers reveal that: `Origin` names the page's site, and `Host` the name that the browser looked up. The
second catches DNS rebinding, where evil.example points its own name to 127.0.0.1 to appear as the same origin.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ANY", "OriginHostMiddleware"]

ANY = "*"

_CHECKED = (b"host", b"origin")

_HSTS = (b"strict-transport-security", b"max-age=31536000")
"""After one visit over TLS, browsers use only TLS for one year."""


class OriginHostMiddleware:
    """An ASGI middleware that rejects requests from foreign pages and for foreign host names. Adds HSTS over TLS.

    Requests without `Origin` pass, since no page of another site sends them. IP addresses and localhost are always
    accepted as host names, because DNS cannot point them elsewhere.

    Args:
        application: The protected app.
        origins: Origins of other sites whose pages may call, as https://example.com; "*" for all.
        hosts: Host names under which this server is reached; "*" for all.
        any_host: Paths that GET and HEAD may request under any host name, or none: load balancers probe servers by
            address or by the name of a container.
    """

    def __init__(
        self,
        application: Any,
        *,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = (),
        any_host: Sequence[str] = (),
    ) -> None:
        self._application = application
        self._any_host = frozenset(any_host)
        self._origins = frozenset(origins)
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or rejects it."""
        if scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
            return
        found = [(key, value.decode("latin-1").lower()) for key, value in scope["headers"] if key in _CHECKED]
        headers = dict(found)
        host = headers.get(b"host", "")
        if len(headers) < len(found):
            # A proxy in front of this server may have checked the other one.
            rejection: PlainTextResponse | None = PlainTextResponse("Duplicate Host or Origin header.\n", 400)
        else:
            rejection = self._check_host(scope, host) or self._check_origin(host, headers.get(b"origin"))
        if scope.get("scheme") == "https" and _split(f"//{host}")[1] != "localhost":
            # On localhost, HSTS would affect every other local server.
            send = _with_header(send, _HSTS)
        if rejection is None:
            await self._application(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await rejection(scope, receive, send)

    def _check_host(self, scope: Any, host: str) -> PlainTextResponse | None:
        """Returns the response to a request for a foreign host name, or None."""
        name = _split(f"//{host}")[1]
        is_probe = scope.get("method") in ("GET", "HEAD") and scope["path"] in self._any_host
        if is_probe or self._is_own_name(name):
            return None
        return PlainTextResponse(f"This server does not answer to the name {name!r}; see --allowed-hosts.\n", 421)

    def _check_origin(self, host: str, origin: str | None) -> PlainTextResponse | None:
        """Returns the response to a request from a foreign page, or None."""
        if origin is None or ANY in self._origins or origin in self._origins or _split(origin)[0] == host:
            return None
        return PlainTextResponse(f"Pages from {origin!r} may not call this server; see --allowed-origins.\n", 403)

    def _is_own_name(self, name: str) -> bool:
        if ANY in self._hosts or name in self._hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _with_header(send: Any, header: tuple[bytes, bytes]) -> Any:
    async def sending(event: Any) -> None:
        if event["type"] == "http.response.start":
            event = {**event, "headers": [*event.get("headers", ()), header]}
        await send(event)

    return sending


def _split(url: str) -> tuple[str, str]:
    """Returns the authority of a URL and the host in it; both are empty if the URL is invalid."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""
