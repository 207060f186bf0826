"""The `/metrics` endpoint on the web port or on its own port, and who may read it.

Metrics show how much a service is used, so they are private by default. There are two ways to read them: on the web
port with an operator's key (without keys, only from this machine), or on a separate address that the operator
configures, which is open to everyone who can reach it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from calotype_server.auth.keys import Role
from calotype_server.errors import RoleRequired, Unauthenticated
from calotype_server.limits import SIDE_PORT_LIMITS
from calotype_server.transport.net.address import is_loopback
from calotype_server.transport.web.origin_guard import ANY, OriginHostMiddleware
from calotype_server.transport.web.uvicorn_server import UvicornServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from calotype_server.auth.access import Access

__all__ = ["MetricsServer", "Render", "metrics_route", "serve_metrics"]

Render = Callable[[str], tuple[bytes, str]]
"""Renders all metrics for an `Accept` header. Returns the body and its content type."""

_log = structlog.get_logger(__name__)

_OPTION = "--metrics-address"

_PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
"""Headers that proxies add, which show that the client may be on another machine."""


def authorize_scrape(request: Request, access: Access, address: str) -> tuple[int, str] | None:
    """Decides whether a request on the web port may read the metrics.

    A proxy on this machine could expose a loopback port to other machines; its headers usually reveal it.

    Args:
        request: The request.
        access: Checks keys.
        address: HOST:PORT that the web port listens on.

    Returns:
        None if it may, otherwise the HTTP status and one sentence with the reason.
    """
    try:
        caller = access.authenticate(request.headers.get("authorization"), "")
        caller.require(Role.OPERATOR)
    except Unauthenticated as error:
        return 401, error.message
    except RoleRequired as error:
        return 403, error.message
    proxied = any(name in request.headers for name in _PROXY_HEADERS)
    if caller.has_key or (is_loopback(address) and is_loopback(request.headers.get("host", "")) and not proxied):
        return None
    return 403, f"Without API keys, only clients on this machine may read metrics; see {_OPTION}."


def metrics_route(render: Render, access: Access, address: str) -> Route:
    """Returns the route `/metrics` of a web port; arguments as for `authorize_scrape`."""

    async def metrics(request: Request) -> Response:
        rejected = authorize_scrape(request, access, address)
        if rejected is None:
            return _response(render, request)
        status, reason = rejected
        return PlainTextResponse(f"{reason}\n", status, {"www-authenticate": "Bearer"} if status == 401 else None)

    return Route("/metrics", metrics)


def _response(render: Render, request: Request) -> Response:
    body, content_type = render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})


@contextlib.asynccontextmanager
async def serve_metrics(address: str | None, render: Render) -> AsyncIterator[None]:
    """Serves `/metrics` on `address` while the block runs. Does nothing if `address` is None.

    Raises:
        AddressInUse: The address is in use, or does not belong to this machine.
    """
    if address is None:
        yield
        return
    server = MetricsServer(address, render)
    _log.info("metrics", address=await server.start())
    try:
        yield
    finally:
        await server.stop()


class MetricsServer:
    """Serves only `/metrics`, to every client that reaches its address.

    Args:
        address: HOST:PORT to listen on; port 0 picks a free one.
        render: Renders the metrics.
    """

    def __init__(self, address: str, render: Render) -> None:
        async def metrics(request: Request) -> Response:
            return _response(render, request)

        application = Starlette(routes=[Route("/metrics", metrics)])
        # On loopback, pages in a local browser must not read metrics; in a network, scrapers use any host name.
        hosts = () if is_loopback(address) else (ANY,)
        guarded = OriginHostMiddleware(application, hosts=hosts)
        self._server = UvicornServer(guarded, SIDE_PORT_LIMITS, option=_OPTION)
        self._address = address

    async def start(self) -> str:
        """Listens and returns the address with the real port.

        Raises:
            AddressInUse: The address is in use, or does not belong to this machine.
        """
        return await self._server.start(self._address)

    async def stop(self) -> None:
        """Closes the port."""
        await self._server.stop()
