"""Assembles the HTTP API: routes, errors, the OpenAPI document and a page that shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route

from calotype_server import __version__
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.http.calotype_routes import calotype_routes
from calotype_server.transport.http.docs import STYLE, render
from calotype_server.transport.http.image_links import ImageLinks
from calotype_server.transport.http.middleware import Contain, HttpMiddleware
from calotype_server.transport.http.openai_models import ImageEvent
from calotype_server.transport.http.openai_routes import openai_routes
from calotype_server.transport.http.page import HEADERS
from calotype_server.transport.http.problems import ERRORS, handle_errors
from calotype_server.transport.http.websocket import websocket_routes

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.routing import BaseRoute

    from calotype_server.api.service import GenerationService
    from calotype_server.auth.access import Access
    from calotype_server.limits import PortLimits
    from calotype_server.transport.net.call_limits import CallLimiter

__all__ = ["HttpApi"]

_PREFIX = "/v1"
_DESCRIPTION = """Streams an image while a diffusion model denoises it. JSON uses the field names of the proto
(snake_case). 64-bit integers are strings, durations look like "1.5s", and fields that are 0, empty or absent are left
out. `/v1/ws` is a WebSocket with the same features, which OpenAPI cannot describe."""


class HttpApi:
    """The HTTP API, to be mounted at the root.

    Args:
        service: Implements the operations.
        access: Checks keys. The document, its page and the addresses of `ImageLinks` need none.
        limits: Sizes and timeouts.
        call_limiter: Counts the calls of each host.
        observe: Receives events about requests and messages.
    """

    def __init__(
        self,
        service: GenerationService,
        access: Access,
        limits: PortLimits,
        call_limiter: CallLimiter,
        observe: Observe = ignore,
    ) -> None:
        self._application = application = FastAPI(
            title="Calotype",
            version=__version__,
            description=_DESCRIPTION,
            servers=[{"url": _PREFIX}],
            root_path_in_servers=False,
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            responses=ERRORS,
        )
        handle_errors(application, observe)
        application.add_middleware(Contain)
        links = ImageLinks()
        for routes in (
            openai_routes(service, links),
            calotype_routes(service),
            websocket_routes(service, call_limiter, observe),
        ):
            application.include_router(routes)
        self._middleware = HttpMiddleware(application, access, limits, call_limiter, observe, is_open=links.is_valid)
        self._page: str | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The OpenAPI document."""
        document = self._application.openapi()
        # OpenAPI 3.1 cannot describe events, so their schemas are added here.
        event = ImageEvent.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= event.pop("$defs") | {event["title"]: event}
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        # The empty entry is for servers without keys.
        document["security"] = [{"key": []}, {}]
        return document

    @property
    def routes(self) -> list[BaseRoute]:
        """The API under /v1, its document and the page that shows the document."""
        return [
            Route("/openapi.json", self._openapi),
            Route("/docs", self._docs),
            Route("/docs.css", self._style),
            Mount(_PREFIX, self._middleware),
        ]

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(self.document)

    async def _style(self, _: Request) -> Response:
        return PlainTextResponse(STYLE, media_type="text/css")

    async def _docs(self, _: Request) -> Response:
        if self._page is None:
            self._page = render(self.document, _PREFIX)
        return HTMLResponse(self._page, headers=HEADERS)
