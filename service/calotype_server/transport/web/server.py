"""The web port: grpc-web, the HTTP API, the page and health checks, behind one guard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Mount, Route

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.grpc.interceptors import interceptors
from calotype_server.transport.grpcweb import GrpcWeb
from calotype_server.transport.http import HttpApi
from calotype_server.transport.http.page import Page
from calotype_server.transport.net.call_limits import CallLimiter
from calotype_server.transport.web.metrics_endpoint import metrics_route
from calotype_server.transport.web.origin_guard import OriginHostMiddleware
from calotype_server.transport.web.uvicorn_server import UvicornServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.requests import Request

    from calotype_server.api.service import Api
    from calotype_server.auth.access import Access
    from calotype_server.transport.net.certificates import Certificates
    from calotype_server.transport.web.metrics_endpoint import Render

__all__ = ["PAGE", "WebServer"]

PAGE = Path(__file__).parents[2] / "page"
"""The built page, where there is one."""

_CORS_REQUEST_HEADERS = (
    "authorization",
    "content-type",
    "grpc-timeout",
    "traceparent",
    "last-event-id",
    "x-grpc-web",
    "x-request-id",
    "x-user-agent",
)
_CORS_RESPONSE_HEADERS = ("grpc-message", "grpc-status", "grpc-status-details-bin", "retry-after", "x-request-id")
_CORS_MAX_AGE_SECONDS = 2 * 60 * 60


class WebServer:
    """Serves browsers on one address.

    Args:
        address: HOST:PORT to listen on; port 0 picks a free one. HOST is one of the allowed hosts.
        register: Adds services to the server that it is given; as for a native one.
        access: Who may call. The page and health checks are for everybody.
        certificates: For TLS, or None for plaintext.
        is_ready: Whether calls are welcome, for `/readyz`.
        api: What the HTTP API offers; without one there is none.
        allowed_origins: Of pages elsewhere that may call, as https://example.com; "*" for all.
        allowed_hosts: Names under which this server is reached; "*" for all.
        page: Folder of the built page.
        limits: What a peer may take.
        peers: Counts the calls of all ports; None for a count of its own.
        transport: Its name in the metrics.
        observe: Told of calls and messages.
        metrics: Makes the answer of `/metrics`; None for no such path.
    """

    def __init__(
        self,
        address: str,
        register: Callable[[Any], object],
        access: Access,
        certificates: Certificates | None = None,
        *,
        is_ready: Callable[[], Awaitable[bool]],
        api: Api | None = None,
        allowed_origins: Sequence[str] = (),
        allowed_hosts: Sequence[str] = (),
        page: Path = PAGE,
        limits: PortLimits = PORT_LIMITS,
        peers: CallLimiter | None = None,
        transport: str = "grpc-web",
        observe: Observe = ignore,
        metrics: Render | None = None,
    ) -> None:
        peers = peers or CallLimiter(limits.max_calls_per_peer)
        measured = [] if metrics is None else [metrics_route(metrics, access, address)]
        http = HttpApi(api, access, limits, peers, observe).routes if api is not None else []
        site = Starlette(routes=[*measured, *http, *_routes(is_ready, page)])
        around = interceptors(access, transport, observe)
        self._grpc_web = GrpcWeb(site, interceptors=around, limits=limits, peers=peers, observe=observe)
        register(self._grpc_web)
        application = CORSMiddleware(
            self._grpc_web,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=_CORS_REQUEST_HEADERS,
            expose_headers=_CORS_RESPONSE_HEADERS,
            max_age=_CORS_MAX_AGE_SECONDS,
        )
        hosts = (*allowed_hosts, address.rpartition(":")[0])
        context = None if certificates is None else certificates.ssl_context()
        self._listener = UvicornServer(
            OriginHostMiddleware(application, origins=allowed_origins, hosts=hosts), limits, context
        )
        self._address = address

    @property
    def active_calls(self) -> int:
        """Calls that have not been answered to the end."""
        return self._grpc_web.active_calls

    async def start(self) -> str:
        """Listens and returns the address with the real port.

        Raises:
            AddressInUse: The address is taken or not one of this machine's.
        """
        return await self._listener.start(self._address)

    async def stop(self, grace: float) -> None:
        """Closes the port; calls under way get `grace` seconds to deliver their end, new ones get UNAVAILABLE."""
        await self._grpc_web.stop(grace)
        await self._listener.stop()


def _routes(is_ready: Callable[[], Awaitable[bool]], page: Path) -> list[BaseRoute]:
    async def alive(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    async def ready(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ready\n") if await is_ready() else PlainTextResponse("not ready\n", 503)

    async def no_page(_: Request) -> PlainTextResponse:
        return PlainTextResponse("Calotype answers grpc-web here. It was installed without its page.\n")

    root = Mount("/", Page(directory=page, html=True)) if page.is_dir() else Route("/", no_page)
    return [Route("/healthz", alive), Route("/readyz", ready), root]
