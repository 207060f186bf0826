"""Who may talk to the web port: pages of which origins, under which names.

A page of any site can make its visitor's browser send requests to addresses that only that browser reaches, such as
127.0.0.1. Two headers tell: `Origin`, the page's own, and `Host`, the name that was looked up. The second catches DNS
rebinding, where a page of evil.example lets its name point to 127.0.0.1 and so becomes "the same origin".
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OriginHostMiddleware"]

ANY = "*"

_HSTS = (b"strict-transport-security", b"max-age=31536000")
"""Browsers that were here over TLS never come in the clear again, for a year."""


class OriginHostMiddleware:
    """An ASGI middleware that refuses requests of foreign pages and for foreign names, and keeps browsers to TLS.

    Requests without an `Origin` pass: they are not a page's doing. IP addresses and localhost are always names of this
    server, since nobody can let them point elsewhere.

    Args:
        application: What is guarded.
        origins: Of pages elsewhere that may call, as https://example.com; "*" for all.
        hosts: Names under which this server is reached; "*" for all.
    """

    def __init__(self, application: Any, *, origins: Sequence[str] = (), hosts: Sequence[str] = ()) -> None:
        self._application = application
        self._origins = frozenset(origins)
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
            return
        read = [(key, value.decode("latin-1").lower()) for key, value in scope["headers"] if key in _READ]
        headers = dict(read)
        host = headers.get(b"host", "")
        if len(headers) < len(read):
            # Whoever stands in between may have read the other one.
            refusal: PlainTextResponse | None = PlainTextResponse("Host and Origin are said once.\n", 400)
        else:
            refusal = self._judge(host, headers.get(b"origin"))
        if scope.get("scheme") == "https" and _split(f"//{host}")[1] != "localhost":
            # On localhost it would count for everything else that is developed there.
            send = _with_header(send, _HSTS)
        if refusal is None:
            await self._application(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refusal(scope, receive, send)

    def _judge(self, host: str, origin: str | None) -> PlainTextResponse | None:
        name = _split(f"//{host}")[1]
        if not self._is_ours(name):
            return PlainTextResponse(f"This server does not answer as {name!r}; see --allowed-hosts.\n", 421)
        if origin is None or ANY in self._origins or origin in self._origins:
            return None
        if _split(origin)[0] == host:
            return None
        return PlainTextResponse(f"Pages of {origin!r} may not call this server; see --allowed-origins.\n", 403)

    def _is_ours(self, name: str) -> bool:
        if ANY in self._hosts or name in self._hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


_READ = (b"host", b"origin")


def _with_header(send: Any, header: tuple[bytes, bytes]) -> Any:
    async def sending(event: Any) -> None:
        if event["type"] == "http.response.start":
            event = {**event, "headers": [*event.get("headers", ()), header]}
        await send(event)

    return sending


def _split(url: str) -> tuple[str, str]:
    """Returns the authority of a URL and the host in it, both empty when it is none."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""
