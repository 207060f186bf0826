"""Calotype's own HTTP routes: generations as server-sent events, and the other gRPC methods as plain requests."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Header, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, create_model
from starlette.exceptions import HTTPException

from calotype.v1 import calotype_pb2 as pb
from calotype_server.transport.http.callers import caller_of
from calotype_server.transport.http.generation_stream import generation_stream
from calotype_server.transport.http.parsing import Lenient, Parsed, parse_query, query_parameters
from calotype_server.transport.http.schema import as_json, response_model
from calotype_server.transport.http.sse import (
    GENERATION_ID,
    KEEPALIVE_SECONDS,
    EventStream,
    Images,
    parse_last_event_id,
    progress_events,
    progress_json,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from calotype_server.api.service import Api
    from calotype_server.types import EncodedImage

__all__ = ["calotype_routes"]

_RECONNECT_GRACE = "10s"
"""Time for an EventSource to reconnect; it waits a few seconds of its own choice."""

_Id = Annotated[str, Path(description="From `Progress.generation_id`.", pattern=f"^{GENERATION_ID}$")]
_Images = Annotated[
    Images, Query(description="Whether images are inside the events, or `image_url` links to them instead.")
]
_LastEventId = Annotated[
    str | None, Header(description="Id of the last event received: continues after it instead of starting over.")
]
_Progress = create_model(
    "Progress",
    __base__=response_model(pb.Progress),
    image_url=(str, Field(None, description="With `images=url`: address of the image, instead of `image`.")),
)
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events named `progress`, and `end` for the last one. Their data is a `Progress` in JSON, their "
        f"id `GENERATION_ID:SEQUENCE`. A comment every {KEEPALIVE_SECONDS} seconds keeps the connection open.",
        # Only OpenAPI 3.2 can describe the schema of each event.
        "content": {"text/event-stream": {}},
    }
}
_ENDED: dict[int | str, dict[str, Any]] = {204: {"description": "`Last-Event-ID` was the last event of its stream."}}
_IMAGE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image file.",
        "content": {f"image/{kind}": {"schema": {"type": "string"}} for kind in ("jpeg", "png", "webp")},
    }
}


def _json_response(message: type[Message]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": response_model(message), "description": "Success."}}


def calotype_routes(api: Api) -> APIRouter:
    """Returns the routes.

    Args:
        api: Implements the operations.
    """
    routes = APIRouter(tags=["Calotype"])
    _StreamRoutes(api).add_to(routes)
    _GenerationRoutes(api).add_to(routes)
    return routes


class _StreamRoutes:
    """Routes that answer with server-sent events."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def add_to(self, routes: APIRouter) -> None:
        responses = _EVENTS | _ENDED
        routes.post("/generate", summary="Start a generation and follow it", responses=responses)(self.generate)
        routes.get(
            "/generate",
            summary="The same for a browser's EventSource",
            responses=responses,
            openapi_extra={"parameters": query_parameters(pb.GenerateRequest)},
        )(self.generate_by_get)
        routes.get(
            "/generations/{generation_id}/events",
            summary="Follow a generation that was started before",
            responses=responses,
            openapi_extra={"parameters": query_parameters(pb.WatchRequest, without=("generation_id",))},
        )(self.watch)

    async def generate(
        self,
        request: Request,
        body: Annotated[Parsed[pb.GenerateRequest], Body(), Lenient(pb.GenerateRequest)],
        images: _Images = "base64",
        last_event_id: _LastEventId = None,
    ) -> Response:
        """Streams server-sent events until the end. `on_disconnect` decides what a disconnect does."""
        if last_event_id:
            return await self._resume(last_event_id, request, images)
        return await self._stream(body, request, images)

    async def generate_by_get(
        self, request: Request, images: _Images = "base64", last_event_id: _LastEventId = None
    ) -> Response:
        """Like `POST`, with the request in the query: dots lead into objects, as in `preview.max_edge_px=256`.

        An EventSource reconnects automatically, so the default of `disconnect_grace` is 10s.
        """
        _reject_other_sites(request)
        if last_event_id:
            return await self._resume(last_event_id, request, images)
        query = {"disconnect_grace": _RECONNECT_GRACE, **_query(request)}
        return await self._stream(parse_query(pb.GenerateRequest, query), request, images)

    async def watch(
        self, request: Request, generation_id: _Id, images: _Images = "base64", last_event_id: _LastEventId = None
    ) -> Response:
        """Works from any connection. Starts with the newest preview, or the end, and continues with new events."""
        if last_event_id:
            return await self._resume(last_event_id, request, images)
        parsed = parse_query(pb.WatchRequest, {**_query(request), "generation_id": generation_id})
        return await self._stream(parsed, request, images)

    async def _resume(self, last_event_id: str, request: Request, images: Images) -> Response:
        generation_id, sequence = parse_last_event_id(last_event_id)
        watch = pb.WatchRequest(generation_id=generation_id, after_sequence=sequence)
        return await self._stream(Parsed(watch, []), request, images)

    async def _stream(
        self, parsed: Parsed[pb.GenerateRequest] | Parsed[pb.WatchRequest], request: Request, images: Images
    ) -> Response:
        async with contextlib.AsyncExitStack() as resources:
            following = await resources.enter_async_context(generation_stream(self._api, parsed, caller_of(request)))
            state = following.generation.log.state
            if (
                isinstance(parsed.value, pb.WatchRequest)
                and state.end is not None
                and state.sequence <= parsed.value.after_sequence
            ):
                # This status makes an EventSource stop reconnecting.
                return Response(status_code=204)
            return EventStream(progress_events(following, images, _base(request)), resources.pop_all())


class _GenerationRoutes:
    """Routes that answer with one JSON object or one image."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def add_to(self, routes: APIRouter) -> None:
        routes.get(
            "/generations",
            summary="List the caller's generations, newest first",
            responses=_json_response(pb.ListGenerationsResponse),
            openapi_extra={"parameters": query_parameters(pb.ListGenerationsRequest)},
        )(self.list_generations)
        routes.get(
            "/generations/{generation_id}",
            summary="State of a generation",
            responses={
                200: {"model": _Progress, "description": "Without an image; `image_url` once it has succeeded."}
            },
        )(self.state)
        routes.post(
            "/generations/{generation_id}/cancel",
            summary="Cancel a generation",
            responses=_json_response(pb.CancelResponse),
        )(self.cancel)
        routes.post(
            "/generations/{generation_id}/finish",
            summary="Finish a generation early",
            responses=_json_response(pb.FinishResponse),
        )(self.finish)
        routes.get(
            "/generations/{generation_id}/preview/{sequence}", summary="The image of an event", responses=_IMAGE
        )(self.preview)
        routes.get("/generations/{generation_id}/image", summary="The final image", responses=_IMAGE)(self.image)
        routes.get("/model", summary="The loaded model, its limits and defaults", responses=_json_response(pb.Model))(
            self.model
        )

    async def list_generations(self, request: Request) -> Response:
        """Lists active, queued and recently ended generations."""
        query = parse_query(pb.ListGenerationsRequest, _query(request))
        return _message_response(self._api.list_generations(query.value, caller_of(request), query.violations))

    async def state(self, request: Request, generation_id: _Id) -> Response:
        """Returns the newest `Progress`."""
        state = self._api.state(generation_id, caller_of(request))
        return JSONResponse(progress_json(state, "url", _base(request)))

    async def cancel(self, request: Request, generation_id: _Id) -> Response:
        """Cancels a queued or active generation. Idempotent: `phase` is the phase it was in."""
        return _message_response(self._api.cancel(pb.CancelRequest(generation_id=generation_id), caller_of(request)))

    async def finish(self, request: Request, generation_id: _Id) -> Response:
        """Ends a generation after the current step. The current estimate becomes the final image."""
        return _message_response(self._api.finish(pb.FinishRequest(generation_id=generation_id), caller_of(request)))

    async def preview(
        self,
        request: Request,
        generation_id: _Id,
        sequence: Annotated[int, Path(description="From `Progress.sequence`.", ge=0, le=2**63 - 1)],
    ) -> Response:
        """Returns the newest preview, of that event or a later one; after the end, the final image."""
        image = await self._api.preview(generation_id, sequence, caller_of(request))
        return _image_response(image, immutable=False)

    async def image(self, request: Request, generation_id: _Id) -> Response:
        """Returns the final image. Answers 404 with a retry delay while there is none yet."""
        return _image_response(self._api.image(generation_id, caller_of(request)), immutable=True)

    async def model(self) -> Response:
        """Returns the same as `GetModel` over gRPC."""
        return _message_response(self._api.model())


def _message_response(message: Message) -> JSONResponse:
    return JSONResponse(as_json(message))


def _image_response(image: EncodedImage, *, immutable: bool) -> Response:
    caching = "private, max-age=31536000, immutable" if immutable else "no-store"
    headers = {"cache-control": caching, "x-content-type-options": "nosniff"}
    return Response(image.data, media_type=f"image/{image.format}", headers=headers)


def _query(request: Request) -> dict[str, str]:
    """Returns the query parameters that are fields of the message."""
    return {name: value for name, value in request.query_params.items() if name != "images"}


def _base(request: Request) -> str:
    """Returns the path under which this API is mounted."""
    base: str = request.scope["root_path"]
    return base


def _reject_other_sites(request: Request) -> None:
    """Prevents pages of other sites from starting generations with an `<img>` or a link, which send no `Origin`."""
    site = request.headers.get("sec-fetch-site", "none")
    if "origin" not in request.headers and site not in ("none", "same-origin"):
        raise HTTPException(403, "Pages of other sites may not start generations")
