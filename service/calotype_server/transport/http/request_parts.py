"""Parts of requests that several routes read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import Path

from calotype_server.transport.http.sse import GENERATION_ID

if TYPE_CHECKING:
    from fastapi import Request

__all__ = ["GenerationId", "base_path", "query_fields"]

GenerationId = Annotated[str, Path(description="From `Progress.generation_id`.", pattern=f"^{GENERATION_ID}$")]


def query_fields(request: Request) -> dict[str, str]:
    """Returns the query parameters that are fields of the message."""
    return {name: value for name, value in request.query_params.items() if name != "images"}


def base_path(request: Request) -> str:
    """Returns the path under which this API is mounted."""
    base: str = request.scope["root_path"]
    return base
