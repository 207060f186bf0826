"""Health checks over HTTP: `/healthz` and `/readyz`, on the web port and on a port of their own.

A port of its own answers probes while strangers fill the other ports: its connections are not shared with them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import structlog
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from calotype_server.limits import SIDE_PORT_LIMITS
from calotype_server.transport.web.uvicorn_server import UvicornServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request

__all__ = ["PROBE_PATHS", "probe_routes", "serve_probes"]

_ALIVE, _READY = PROBE_PATHS = ("/healthz", "/readyz")

_log = structlog.get_logger(__name__)


def probe_routes(is_ready: Callable[[], Awaitable[bool]]) -> list[Route]:
    """Returns the routes of the health checks.

    Args:
        is_ready: Whether the server accepts calls.
    """

    async def alive(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    async def ready(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ready\n") if await is_ready() else PlainTextResponse("not ready\n", 503)

    return [Route(_ALIVE, alive), Route(_READY, ready)]


@contextlib.asynccontextmanager
async def serve_probes(address: str | None, is_ready: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
    """Serves the health checks on `address` while the block runs, in plaintext and for any Host header.

    Args:
        address: HOST:PORT, or None to do nothing.
        is_ready: Whether the server accepts calls.

    Raises:
        AddressInUse: The address is in use, or does not belong to this machine.
    """
    if address is None:
        yield
        return
    server = UvicornServer(Starlette(routes=probe_routes(is_ready)), SIDE_PORT_LIMITS, option="--probe-address")
    _log.info("probes", address=await server.start(address))
    try:
        yield
    finally:
        await server.stop()
