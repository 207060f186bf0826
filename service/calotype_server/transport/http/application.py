"""Puts the HTTP API together: routes, errors, the OpenAPI document and a page that shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route

from calotype_server import __version__
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.http.calotype_routes import native_routes
from calotype_server.transport.http.docs import STYLE, render
from calotype_server.transport.http.middleware import HttpMiddleware
from calotype_server.transport.http.openai_models import ImageEvent
from calotype_server.transport.http.openai_routes import openai_routes
from calotype_server.transport.http.page import HEADERS
from calotype_server.transport.http.problems import ERRORS, handle_errors
from calotype_server.transport.http.websocket import socket_routes

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.routing import BaseRoute

    from calotype_server.api.service import Api
    from calotype_server.auth.access import Access
    from calotype_server.limits import PortLimits
    from calotype_server.transport.net.call_limits import CallLimiter

__all__ = ["HttpApi"]

_PREFIX = "/v1"
_DESCRIPTION = """Streams an image while a diffusion model denoises it. JSON has the names of the proto (snake_case);
64-bit integers come as strings, durations as "1.5s", and what is 0, empty or absent is left out. `/v1/ws` is a
WebSocket for the same, which OpenAPI cannot describe."""


class HttpApi:
    """The HTTP API, to be served at the root.

    Args:
        api: Does what is asked for.
        access: Who may call. The document and its page are for everybody.
        limits: What a peer may take.
        peers: Counts what each has under way.
        observe: Told of requests and of what is sent.
    """

    def __init__(
        self, api: Api, access: Access, limits: PortLimits, peers: CallLimiter, observe: Observe = ignore
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
        for routes in (openai_routes(api), native_routes(api), socket_routes(api, peers, observe)):
            application.include_router(routes)
        self._edge = HttpMiddleware(application, access, limits, peers, observe)
        self._page: str | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The OpenAPI document."""
        document = self._application.openapi()
        # Those of events, which OpenAPI 3.1 has no place for.
        event = ImageEvent.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= event.pop("$defs") | {event["title"]: event}
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        # Without keys on the server, none is asked for.
        document["security"] = [{"key": []}, {}]
        return document

    @property
    def routes(self) -> list[BaseRoute]:
        """The API under /v1, its document and the page that shows it."""
        return [
            Route("/openapi.json", self._openapi),
            Route("/docs", self._docs),
            Route("/docs.css", self._style),
            Mount(_PREFIX, self._edge),
        ]

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(self.document)

    async def _style(self, _: Request) -> Response:
        return PlainTextResponse(STYLE, media_type="text/css")

    async def _docs(self, _: Request) -> Response:
        if self._page is None:
            self._page = render(self.document, _PREFIX)
        return HTMLResponse(self._page, headers=HEADERS)
