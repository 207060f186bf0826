"""`/metrics`, who may read it, and a port of its own for it.

Metrics tell how much a service is used, which is nobody's business by default. So there are two ways to them: on the
web port when it listens on loopback, for readers on this machine; or on an address that the operator names for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from calotype_server.transport.address import is_loopback
from calotype_server.transport.guard import ANY, Guard
from calotype_server.transport.listener import Listener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

__all__ = ["MetricsServer", "Render", "metrics_route", "refusal", "serve_metrics"]

Render = Callable[[str], tuple[bytes, str]]
"""Takes an `Accept` header, returns all metrics and their content type."""

_log = structlog.get_logger(__name__)

_OPTION = "--metrics-address"

_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
"""Headers by which proxies tell that the reader is elsewhere."""


def refusal(request: Request) -> str | None:
    """Decides about a reader on the web port: None to let them read, or a sentence that says why not.

    A proxy on this machine lets the world in to a port on loopback; it mostly shows in the headers.
    """
    host = request.headers.get("host", "")
    if is_loopback(host) and not any(name in request.headers for name in _FORWARDED):
        return None
    return f"Metrics are for readers on this machine; see {_OPTION}.\n"


def metrics_route(render: Render, refuse: Callable[[Request], str | None] = refusal) -> Route:
    """Returns the route `/metrics`.

    Args:
        render: Makes the answer.
        refuse: Decides about readers.
    """

    async def metrics(request: Request) -> Response:
        if (reason := refuse(request)) is not None:
            return PlainTextResponse(reason, 403)
        body, content_type = render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})

    return Route("/metrics", metrics)


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
        application = Starlette(routes=[metrics_route(render, lambda _: None)])
        # A page in a browser on this machine must not read it; in a network, scrapers come under any name.
        hosts = () if is_loopback(address) else (ANY,)
        self._listener = Listener(Guard(application, hosts=hosts), option=_OPTION)
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
