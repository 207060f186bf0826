"""Which HTTP methods a path accepts: for `Allow`, CORS and HEAD, as RFC 9110 describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.routing import Match, Mount

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.routing import BaseRoute

__all__ = ["allowed_methods", "as_get", "is_head"]

_HEAD = "calotype.head"


def allowed_methods(routes: Sequence[BaseRoute], scope: Any) -> list[str]:
    """Returns the methods that a path accepts, in alphabetical order; none for an unknown path.

    Args:
        routes: Of the app.
        scope: The ASGI scope of a request for the path.
    """
    found = [method for method in ("GET", "POST") if _accepts(routes, {**scope, "type": "http", "method": method})]
    return sorted([*found, "HEAD"] if "GET" in found else found)


def _accepts(routes: Sequence[BaseRoute], scope: Any) -> bool:
    for route in routes:
        match, child = route.matches(scope)
        if match is Match.FULL:
            if not isinstance(route, Mount):
                return True
            # A mount without routes serves files.
            return _accepts(route.routes, {**scope, **child}) if route.routes else scope["method"] == "GET"
    return False


def as_get(scope: Any) -> Any:
    """Returns the scope with which the app answers a request: for HEAD that of a GET. uvicorn drops the body."""
    return {**scope, "method": "GET", _HEAD: True} if scope.get("method") == "HEAD" else scope


def is_head(scope: Any) -> bool:
    """Returns whether a scope is that of a HEAD request, so that a GET must have no effect."""
    return _HEAD in scope
