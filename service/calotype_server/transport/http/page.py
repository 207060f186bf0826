"""Serves the built page with a content security policy that allows only what the page needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import PlainTextResponse
from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from starlette.responses import Response

__all__ = ["HEADERS", "Page"]

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        # Previews are displayed from memory.
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
)

HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Page(StaticFiles):
    """Static files. Files under `assets/` have a hash of their content in their name, so they never change."""

    async def get_response(self, path: str, scope: Any) -> Response:
        """Returns a file, or 404 or 405."""
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("Use GET.\n", 405, {"allow": "GET, HEAD"})
        response = await super().get_response(path, scope)
        immutable = path.startswith("assets/") and response.status_code == 200
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if immutable else "no-cache"
        response.headers.update(HEADERS)
        return response
