"""`/metrics`, who may read it, and a port of its own for it.

Metrics tell how much a service is used, which is nobody's business by default. So there are two ways to them: on the
web port, for operators' keys, or where there are no keys for readers on this machine; or on an address that the
operator names for them, for everybody who reaches it.
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
from calotype_server.transport.net.address import is_loopback
from calotype_server.transport.web.origin_guard import ANY, OriginHostMiddleware
from calotype_server.transport.web.uvicorn_server import UvicornServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from calotype_server.auth.access import Access

__all__ = ["MetricsServer", "Render", "metrics_route", "serve_metrics"]

Render = Callable[[str], tuple[bytes, str]]
"""Takes an `Accept` header, returns all metrics and their content type."""

_log = structlog.get_logger(__name__)

_OPTION = "--metrics-address"

_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
"""Headers by which proxies tell that the reader is elsewhere."""


def authorize_scrape(request: Request, access: Access, address: str) -> tuple[int, str] | None:
    """Decides about a reader on the web port: None to let them read, or the status and sentence that says why not.

    Without keys, a proxy on this machine could let the world in to a port on loopback; it mostly shows in the headers.

    Args:
        request: The reader's.
        access: The keys.
        address: HOST:PORT that the port listens on.
    """
    try:
        caller = access.authenticate(request.headers.get("authorization"), "")
        caller.require(Role.OPERATOR)
    except Unauthenticated as error:
        return 401, error.message
    except RoleRequired as error:
        return 403, error.message
    forwarded = any(name in request.headers for name in _FORWARDED)
    if caller.has_key or (is_loopback(address) and is_loopback(request.headers.get("host", "")) and not forwarded):
        return None
    return 403, f"Without keys, metrics are for readers on this machine; see {_OPTION}."


def metrics_route(render: Render, access: Access, address: str) -> Route:
    """Returns the route `/metrics` of a web port, for those whom `authorize_scrape` lets read."""

    async def metrics(request: Request) -> Response:
        refused = authorize_scrape(request, access, address)
        if refused is None:
            return _answer(render, request)
        status, reason = refused
        return PlainTextResponse(f"{reason}\n", status, {"www-authenticate": "Bearer"} if status == 401 else None)

    return Route("/metrics", metrics)


def _answer(render: Render, request: Request) -> Response:
    body, content_type = render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})


@contextlib.asynccontextmanager
async def serve_metrics(address: str | None, render: Render) -> AsyncIterator[None]:
    """Serves `/metrics` on `address` while the block runs; nothing happens without an address.

    Raises:
        AddressInUse: The address is taken or not one of this machine's.
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
    """Serves `/metrics`, and nothing else, to whoever reaches its address.

    Args:
        address: HOST:PORT to listen on; port 0 picks a free one.
        render: Makes the answer.
    """

    def __init__(self, address: str, render: Render) -> None:
        async def metrics(request: Request) -> Response:
            return _answer(render, request)

        application = Starlette(routes=[Route("/metrics", metrics)])
        # A page in a browser on this machine must not read it; in a network, scrapers come under any name.
        hosts = () if is_loopback(address) else (ANY,)
        self._listener = UvicornServer(OriginHostMiddleware(application, hosts=hosts), option=_OPTION)
        self._address = address

    async def start(self) -> str:
        """Listens and returns the address with the real port.

        Raises:
            AddressInUse: The address is taken or not one of this machine's.
        """
        return await self._listener.start(self._address)

    async def stop(self) -> None:
        """Closes the port."""
        await self._listener.stop()
