"""Lets pages of the allowed origins call the web port.

Source: https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Cors"]

_RESPONSE_HEADERS = (
    *("accept-encoding", "accept-post", "allow", "grpc-message", "grpc-status", "grpc-status-details-bin"),
    *("calotype-warnings", "retry-after", "www-authenticate", "x-request-id", "x-should-retry"),
)
"""Headers of responses that pages may read, in addition to those that are always readable."""

_MAX_AGE_SECONDS = 2 * 60 * 60

_METHODS = ("GET", "HEAD", "POST")


class Cors(CORSMiddleware):
    """Answers preflight requests, which need no key, and adds CORS headers to responses.

    An allowed page may send any header, because clients add their own: OpenAI's SDK sends several `x-stainless-...`,
    tracing sends `baggage`, and gRPC callers send metadata. A preflight lists the methods of the path.

    Args:
        application: The app inside.
        origins: Origins whose pages may call, as https://example.com; "*" for all.
        methods_of: Returns the methods of the path in an ASGI scope; none for an unknown path.
    """

    def __init__(self, application: Any, origins: Sequence[str], methods_of: Callable[[Any], Sequence[str]]) -> None:
        super().__init__(
            application,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=["*"],
            # The operator's list also holds for pages on the internet that call a server in a local network.
            allow_private_network=True,
            expose_headers=_RESPONSE_HEADERS,
            max_age=_MAX_AGE_SECONDS,
        )
        self._methods_of = methods_of

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a preflight request, or passes a request on."""
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            headers = Headers(scope=scope)
            if "origin" in headers and "access-control-request-method" in headers:
                response = self.preflight_response(headers)
                # With all methods for an unknown path, the page can read the 404 of its request.
                methods = self._methods_of(scope) or _METHODS
                response.headers["access-control-allow-methods"] = ", ".join(methods)
                await response(scope, receive, send)
                return
        await super().__call__(scope, receive, send)
