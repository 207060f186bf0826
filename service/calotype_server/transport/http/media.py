"""Which content types and codings request bodies may have; others get 415, as RFC 9110 describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import Request  # noqa: TC002 - FastAPI reads the annotation
from starlette.exceptions import HTTPException

from calotype_server.transport.http.problems import http_error
from calotype_server.transport.net.body import is_encoded

if TYPE_CHECKING:
    from fastapi.responses import JSONResponse

__all__ = ["reject_coding", "require_json"]

_JSON = "application/json"


def reject_coding(scope: Any) -> JSONResponse | None:
    """Returns the response to a request whose body is compressed, or None if it is not."""
    if not is_encoded(scope):
        return None
    return http_error(415, "Send the body without Content-Encoding.", {"accept-encoding": "identity"})


async def require_json(request: Request) -> None:
    """Rejects a request whose body is not JSON. For a route that has a body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _JSON and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPException(415, f"Send the body as {_JSON}", {"accept-post": _JSON})
