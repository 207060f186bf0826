"""The web port: grpc-web, the HTTP API, the page and health checks, behind one host and origin check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Mount, Route

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.grpc.interceptors import interceptors
from calotype_server.transport.grpcweb import GrpcWeb
from calotype_server.transport.http import HttpApi
from calotype_server.transport.http.methods import allowed_methods
from calotype_server.transport.http.page import Page
from calotype_server.transport.net.call_limits import CallLimiter
from calotype_server.transport.net.proxies import NO_PROXIES, TrustedProxies
from calotype_server.transport.web.client_address import ClientAddressMiddleware
from calotype_server.transport.web.closing import ClosingMiddleware
from calotype_server.transport.web.cors import Cors
from calotype_server.transport.web.metrics_endpoint import metrics_route
from calotype_server.transport.web.origin_guard import OriginHostMiddleware
from calotype_server.transport.web.probes import PROBE_PATHS, probe_routes
from calotype_server.transport.web.uvicorn_server import UvicornServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.requests import Request

    from calotype_server.api.service import GenerationService
    from calotype_server.auth.access import Access
    from calotype_server.transport.net.certificates import Certificates
    from calotype_server.transport.web.metrics_endpoint import Render

__all__ = ["PAGE", "WebServer"]

PAGE = Path(__file__).parents[2] / "page"
"""Folder of the built page; absent if the page was not built."""


class WebServer:
    """Serves browsers on one address.

    Args:
        address: HOST:PORT to listen on; port 0 picks a free one. HOST becomes one of the allowed hosts.
        register: Registers gRPC services on the server that it receives.
        access: Checks keys. The page and health checks need none.
        certificates: For TLS, or None for plaintext.
        is_ready: Whether the server accepts calls, for `/readyz`.
        service: Backs the HTTP API; None for no HTTP API.
        allowed_origins: Origins of other sites whose pages may call, as https://example.com; "*" for all.
        allowed_hosts: Host names under which this server is reached; "*" for all.
        page: Folder of the built page.
        limits: Limits per connection and per host.
        call_limiter: Counts the calls of a host on all ports; None to count those of this port only.
        transport: Name of the port in the metrics.
        observe: Receives events about calls and messages.
        metrics: Renders `/metrics`; None for no such path.
        proxies: Trusted proxies, whose requests count for the clients behind them.
    """

    def __init__(
        self,
        address: str,
        register: Callable[[Any], object],
        access: Access,
        certificates: Certificates | None = None,
        *,
        is_ready: Callable[[], Awaitable[bool]],
        service: GenerationService | None = None,
        allowed_origins: Sequence[str] = (),
        allowed_hosts: Sequence[str] = (),
        page: Path = PAGE,
        limits: PortLimits = PORT_LIMITS,
        call_limiter: CallLimiter | None = None,
        transport: str = "grpc-web",
        observe: Observe = ignore,
        metrics: Render | None = None,
        proxies: TrustedProxies = NO_PROXIES,
    ) -> None:
        call_limiter = call_limiter or CallLimiter(limits.max_calls_per_peer)
        metrics_routes = [] if metrics is None else [metrics_route(metrics, access, address)]
        api_routes = [] if service is None else HttpApi(service, access, limits, call_limiter, observe).routes
        self._routes = [*metrics_routes, *api_routes, *probe_routes(is_ready), _page_route(page)]
        self._grpc_web = GrpcWeb(
            Starlette(routes=self._routes),
            interceptors=interceptors(access, transport, observe),
            limits=limits,
            call_limiter=call_limiter,
            observe=observe,
        )
        register(self._grpc_web)
        application = Cors(self._grpc_web, allowed_origins, self._methods_of)
        hosts = (*allowed_hosts, address.rpartition(":")[0])
        context = None if certificates is None else certificates.ssl_context()
        guarded = OriginHostMiddleware(application, origins=allowed_origins, hosts=hosts, any_host=PROBE_PATHS)
        self._closing = ClosingMiddleware(ClientAddressMiddleware(guarded, proxies))
        self._server = UvicornServer(self._closing, limits, context, proxies=proxies)
        self._address = address

    @property
    def active_calls(self) -> int:
        """Number of grpc-web calls whose response is not complete."""
        return self._grpc_web.active_calls

    def _methods_of(self, scope: Any) -> list[str]:
        """Returns the methods of the path in an ASGI scope."""
        return ["POST"] if self._grpc_web.has_method(scope["path"]) else allowed_methods(self._routes, scope)

    async def start(self) -> str:
        """Listens and returns the address with the real port.

        Raises:
            AddressInUse: The address is in use, or does not belong to this machine.
        """
        return await self._server.start(self._address)

    def drain(self) -> None:
        """Ends each connection after its next response; clients then connect to another server behind a proxy."""
        self._closing.begin()

    async def stop(self, grace: float) -> None:
        """Closes the port. Active calls have `grace` seconds to send their last message; new ones get UNAVAILABLE."""
        await self._grpc_web.stop(grace)
        await self._server.stop()


def _page_route(page: Path) -> BaseRoute:
    """Returns the route of the page."""

    async def no_page(_: Request) -> PlainTextResponse:
        return PlainTextResponse("This port answers grpc-web. Calotype was installed without its web page.\n")

    return Mount("/", Page(directory=page, html=True)) if page.is_dir() else Route("/", no_page)
