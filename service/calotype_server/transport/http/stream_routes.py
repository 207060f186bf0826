"""HTTP routes that start or follow a generation and answer with server-sent events."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Query, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import GenerationNotFound
from calotype_server.transport.http.callers import caller_of
from calotype_server.transport.http.generation_stream import generation_stream
from calotype_server.transport.http.media import require_json
from calotype_server.transport.http.methods import is_head
from calotype_server.transport.http.parsing import Lenient, Parsed, parse_query, query_parameters
from calotype_server.transport.http.problems import is_event_source
from calotype_server.transport.http.request_parts import GenerationId, base_path, query_fields
from calotype_server.transport.http.sse import (
    KEEPALIVE_SECONDS,
    EventStream,
    Images,
    empty_event_stream,
    parse_last_event_id,
    progress_events,
)

if TYPE_CHECKING:
    from calotype_server.api.service import GenerationService
    from calotype_server.auth.access import Caller

__all__ = ["StreamRoutes"]

_RECONNECT_GRACE = "10s"
"""Time for an EventSource to reconnect; browsers choose a delay of a few seconds."""

_Images = Annotated[
    Images, Query(description="Whether images are inside the events, or `image_url` links to them instead.")
]
_LastEventId = Annotated[
    str | None, Header(description="Id of the last event received: continues after it instead of starting over.")
]
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events named `progress`, and `end` for the last one. Their data is a `Progress` in JSON, their "
        f"id `GENERATION_ID:SEQUENCE`, or `GENERATION_ID:end`. A comment every {KEEPALIVE_SECONDS} seconds keeps the "
        "connection open. A `GET` with `Accept: text/event-stream` that fails, but would succeed later, gets one event "
        "named `waiting` with a `Problem` as data, and the delay in `retry`.",
        # Only OpenAPI 3.2 can describe the schema of each event.
        "content": {"text/event-stream": {}},
    }
}
_ENDED: dict[int | str, dict[str, Any]] = {204: {"description": "`Last-Event-ID` was the last event of its stream."}}


class StreamRoutes:
    """The handlers of these routes, as methods.

    Args:
        service: Implements the operations.
    """

    def __init__(self, service: GenerationService) -> None:
        self._service = service

    def add_to(self, routes: APIRouter) -> None:
        """Registers the routes."""
        responses = _EVENTS | _ENDED
        routes.post(
            "/generate",
            summary="Start a generation and follow it",
            responses=responses,
            dependencies=[Depends(require_json)],
        )(self.generate)
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
        """Like `POST`, with the request in the query.

        Dots lead into objects, as in `preview.max_edge_px=256`, and numbers into lists, as in `loras.0.name`,
        `loras.1.name`.

        An EventSource reconnects automatically, so the default of `disconnect_grace` is 10s. If it reconnects too late,
        or to a server that has lost the generation in a restart, the generation starts again.
        """
        _reject_other_sites(request)
        if is_head(request.scope):
            return empty_event_stream()
        query = {"disconnect_grace": _RECONNECT_GRACE, **query_fields(request)}
        parsed = parse_query(pb.GenerateRequest, query)
        if last_event_id:
            again = parsed if is_event_source(request.scope) else None
            return await self._resume(last_event_id, request, images, again)
        return await self._stream(parsed, request, images)

    async def watch(
        self,
        request: Request,
        generation_id: GenerationId,
        images: _Images = "base64",
        last_event_id: _LastEventId = None,
    ) -> Response:
        """Works from any connection. Starts with the newest preview, or the end, and continues with new events."""
        if is_head(request.scope):
            self._service.state(generation_id, caller_of(request))
            return empty_event_stream()
        if last_event_id:
            return await self._resume(last_event_id, request, images)
        parsed = parse_query(pb.WatchRequest, {**query_fields(request), "generation_id": generation_id})
        return await self._stream(parsed, request, images)

    async def _resume(
        self,
        last_event_id: str,
        request: Request,
        images: Images,
        again: Parsed[pb.GenerateRequest] | None = None,
    ) -> Response:
        """Continues after an event; with `again`, a generation that was lost is started again with this request."""
        generation_id, sequence = parse_last_event_id(last_event_id)
        if sequence is None:
            # This status makes an EventSource stop reconnecting.
            return Response(status_code=204)
        if again is not None and self._is_lost(generation_id, caller_of(request)):
            return await self._stream(again, request, images)
        watch = pb.WatchRequest(generation_id=generation_id, after_sequence=sequence)
        return await self._stream(Parsed(watch, []), request, images)

    def _is_lost(self, generation_id: str, caller: Caller) -> bool:
        """Returns whether a generation is unknown, or fails only for lack of a reader, server or disk."""
        try:
            return self._service.generations.find(generation_id, caller).is_replaceable
        except GenerationNotFound:
            return True

    async def _stream(
        self, parsed: Parsed[pb.GenerateRequest] | Parsed[pb.WatchRequest], request: Request, images: Images
    ) -> Response:
        async with contextlib.AsyncExitStack() as resources:
            stream = await resources.enter_async_context(generation_stream(self._service, parsed, caller_of(request)))
            reconnects = is_event_source(request.scope)
            events = progress_events(stream, images, base_path(request), reconnects=reconnects)
            return EventStream(events, resources.pop_all())


def _reject_other_sites(request: Request) -> None:
    """Prevents pages of other sites from starting generations with an `<img>` or a link, which send no `Origin`."""
    site = request.headers.get("sec-fetch-site", "none")
    if "origin" not in request.headers and site not in ("none", "same-origin"):
        raise HTTPException(403, "Pages of other sites may not start generations")
