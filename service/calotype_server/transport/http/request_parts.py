"""Parts of requests and responses that several routes share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Path
from fastapi.responses import Response

from calotype_server.transport.http.sse import GENERATION_ID

if TYPE_CHECKING:
    from fastapi import Request

    from calotype_server.types import EncodedImage

__all__ = ["IMAGE_RESPONSES", "GenerationId", "base_path", "image_response", "query_fields"]

GenerationId = Annotated[str, Path(description="From `Progress.generation_id`.", pattern=f"^{GENERATION_ID}$")]

IMAGE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image file.",
        "content": {f"image/{kind}": {"schema": {"type": "string"}} for kind in ("jpeg", "png", "webp")},
    }
}


def query_fields(request: Request) -> dict[str, str]:
    """Returns the query parameters that are fields of the message."""
    return {name: value for name, value in request.query_params.items() if name != "images"}


def base_path(request: Request) -> str:
    """Returns the path under which this API is mounted."""
    base: str = request.scope["root_path"]
    return base


def image_response(image: EncodedImage, *, immutable: bool) -> Response:
    """Returns an image file.

    Args:
        image: The file.
        immutable: Whether the address always returns the same image.
    """
    caching = "private, max-age=31536000, immutable" if immutable else "no-store"
    headers = {"cache-control": caching, "x-content-type-options": "nosniff"}
    return Response(image.data, media_type=f"image/{image.format}", headers=headers)
