"""Calotype's own HTTP: generations as server-sent events, and what else the gRPC service does, as plain requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Header, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, create_model
from starlette.exceptions import HTTPException

from calotype.v1 import calotype_pb2 as pb
from calotype_server.transport.http.callers import caller_of
from calotype_server.transport.http.parsing import Lenient, Parsed, parse_query, query_parameters
from calotype_server.transport.http.schema import as_json, response_model
from calotype_server.transport.http.sse import EventStream, Images, parse_last_event_id, progress_events, progress_json

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from calotype_server.api.service import Api
    from calotype_server.types import EncodedImage

__all__ = ["native_routes"]

_GRACE = "10s"
"""For an EventSource to come back, which waits some seconds of its own choice."""

_Id = Annotated[str, Path(description="From `Progress.generation_id`.", pattern=r"^[A-Za-z0-9._-]{1,128}$")]
_Images = Annotated[
    Images, Query(description="Whether pictures are inside the events, or `image_url` tells where to get them.")
]
_LastEventId = Annotated[
    str | None, Header(description="The id of the last event seen: goes on after it, instead of beginning anew.")
]
_Progress = create_model(
    "Progress",
    __base__=response_model(pb.Progress),
    image_url=(str, Field(None, description="With `images=url`: where to get the picture, in place of `image`.")),
)
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events named `progress`, and `end` for the last. Their data are a `Progress` in JSON, their "
        "ids `GENERATION_ID:SEQUENCE`. A comment every 15 seconds keeps the connection alive.",
        # A schema for each event is what OpenAPI 3.2 brings.
        "content": {"text/event-stream": {}},
    }
}
_ENDED: dict[int | str, dict[str, Any]] = {204: {"description": "`Last-Event-ID` was the last one: all is told."}}
_IMAGE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "content": {f"image/{kind}": {"schema": {"type": "string"}} for kind in ("jpeg", "png", "webp")},
    }
}


def _json(message: type[Message]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": response_model(message), "description": "Done."}}


def native_routes(api: Api) -> APIRouter:
    """Returns the routes.

    Args:
        api: Does what is asked for.
    """
    routes = APIRouter(tags=["Calotype"])

    async def resume(last_event_id: str, request: Request, images: Images) -> Response:
        generation_id, sequence = parse_last_event_id(last_event_id)
        watch = pb.WatchRequest(generation_id=generation_id, after_sequence=sequence)
        return await follow(Parsed(watch, []), request, images)

    async def follow(watch: Parsed[pb.WatchRequest], request: Request, images: Images) -> Response:
        following = api.watch(watch.value, caller_of(request), whole=True, violations=watch.violations)
        state = following.generation.log.state
        if state.end is not None and state.sequence <= watch.value.after_sequence:
            await following.aclose()
            # Tells an EventSource not to come back.
            return Response(status_code=204)
        return EventStream(following, progress_events(following, images, _base(request)))

    async def begin(given: Parsed[pb.GenerateRequest], request: Request, images: Images) -> Response:
        following = await api.generate(given.value, caller_of(request), whole=True, violations=given.violations)
        return EventStream(following, progress_events(following, images, _base(request)))

    @routes.post("/generate", summary="Start a generation and follow it", responses=_EVENTS | _ENDED)
    async def generate(
        request: Request,
        body: Annotated[Parsed[pb.GenerateRequest], Body(), Lenient(pb.GenerateRequest)],
        images: _Images = "base64",
        last_event_id: _LastEventId = None,
    ) -> Response:
        """Streams server-sent events up to the end. Leaving does what `on_disconnect` says."""
        if last_event_id:
            return await resume(last_event_id, request, images)
        return await begin(body, request, images)

    @routes.get(
        "/generate",
        summary="The same for a browser's EventSource",
        responses=_EVENTS | _ENDED,
        openapi_extra={"parameters": query_parameters(pb.GenerateRequest)},
    )
    async def generate_by_get(
        request: Request, images: _Images = "base64", last_event_id: _LastEventId = None
    ) -> Response:
        """As `POST`, with the request in the query: dots lead into objects, as in `preview.max_edge_px=256`.

        An EventSource reconnects by itself, so `disconnect_grace` is 10s unless it is given.
        """
        _refuse_other_sites(request)
        if last_event_id:
            return await resume(last_event_id, request, images)
        query = {"disconnect_grace": _GRACE, **_query(request)}
        return await begin(parse_query(pb.GenerateRequest, query), request, images)

    @routes.get(
        "/generations",
        summary="List the caller's generations, the newest first",
        responses=_json(pb.ListGenerationsResponse),
        openapi_extra={"parameters": query_parameters(pb.ListGenerationsRequest)},
    )
    async def list_generations(request: Request) -> Response:
        """Those that run, wait, or have ended a short while ago."""
        query = parse_query(pb.ListGenerationsRequest, _query(request))
        return _answer(api.list_generations(query.value, caller_of(request), query.violations))

    @routes.get(
        "/generations/{generation_id}",
        summary="Where a generation stands",
        responses={200: {"model": _Progress, "description": "Without a picture; `image_url` once it has succeeded."}},
    )
    async def state(request: Request, generation_id: _Id) -> Response:
        """The newest `Progress`."""
        return JSONResponse(progress_json(api.state(generation_id, caller_of(request)), "url", _base(request)))

    @routes.get(
        "/generations/{generation_id}/events",
        summary="Follow a generation that was started before",
        responses=_EVENTS | _ENDED,
        openapi_extra={"parameters": query_parameters(pb.WatchRequest, without=("generation_id",))},
    )
    async def watch(
        request: Request, generation_id: _Id, images: _Images = "base64", last_event_id: _LastEventId = None
    ) -> Response:
        """From any connection: the newest preview again, or the end, and then whatever comes."""
        if last_event_id:
            return await resume(last_event_id, request, images)
        parsed = parse_query(pb.WatchRequest, {**_query(request), "generation_id": generation_id})
        return await follow(parsed, request, images)

    @routes.post(
        "/generations/{generation_id}/cancel", summary="Cancel a generation", responses=_json(pb.CancelResponse)
    )
    async def cancel(request: Request, generation_id: _Id) -> Response:
        """Queued or running. Idempotent: `phase` tells in which phase it was found."""
        return _answer(api.cancel(pb.CancelRequest(generation_id=generation_id), caller_of(request)))

    @routes.post(
        "/generations/{generation_id}/finish",
        summary="Take the picture as it is",
        responses=_json(pb.FinishResponse),
    )
    async def finish(request: Request, generation_id: _Id) -> Response:
        """Ends it after the step under way, with the current estimate as the final image."""
        return _answer(api.finish(pb.FinishRequest(generation_id=generation_id), caller_of(request)))

    @routes.get("/generations/{generation_id}/preview/{sequence}", summary="The picture of an event", responses=_IMAGE)
    async def preview(
        request: Request,
        generation_id: _Id,
        sequence: Annotated[int, Path(description="From `Progress.sequence`.", ge=0, le=2**63 - 1)],
    ) -> Response:
        """The newest preview, at least as new as that event; after the end, the final image."""
        return _file(await api.preview(generation_id, sequence, caller_of(request)), lasting=False)

    @routes.get("/generations/{generation_id}/image", summary="The final image", responses=_IMAGE)
    async def image(request: Request, generation_id: _Id) -> Response:
        """404 with a time to come back while there is none yet."""
        return _file(api.image(generation_id, caller_of(request)), lasting=True)

    @routes.get("/model", summary="The loaded model, its limits and defaults", responses=_json(pb.Model))
    async def model() -> Response:
        """As `GetModel` over gRPC."""
        return _answer(api.model())

    return routes


def _answer(message: Message) -> JSONResponse:
    return JSONResponse(as_json(message))


def _file(image: EncodedImage, *, lasting: bool) -> Response:
    caching = "private, max-age=31536000, immutable" if lasting else "no-store"
    headers = {"cache-control": caching, "x-content-type-options": "nosniff"}
    return Response(image.data, media_type=f"image/{image.format}", headers=headers)


def _query(request: Request) -> dict[str, str]:
    """The query, without what is no part of the message."""
    return {name: value for name, value in request.query_params.items() if name != "images"}


def _base(request: Request) -> str:
    """The path under which this API is mounted."""
    base: str = request.scope["root_path"]
    return base


def _refuse_other_sites(request: Request) -> None:
    """Keeps pages elsewhere from starting generations by an `<img>` or a link, which carry no `Origin`."""
    site = request.headers.get("sec-fetch-site", "none")
    if "origin" not in request.headers and site not in ("none", "same-origin"):
        raise HTTPException(403, "Pages of other sites may not start generations")
