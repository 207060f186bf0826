"""Calotype's own HTTP routes: those of `stream_routes`, and the unary gRPC methods as plain requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, create_model

from calotype.v1 import calotype_pb2 as pb
from calotype_server.transport.http.callers import caller_of
from calotype_server.transport.http.media import require_json
from calotype_server.transport.http.parsing import Lenient, Parsed, parse_query, query_parameters
from calotype_server.transport.http.request_parts import (
    IMAGE_RESPONSES,
    GenerationId,
    base_path,
    image_response,
    query_fields,
)
from calotype_server.transport.http.schema import as_json, response_model
from calotype_server.transport.http.sse import progress_json
from calotype_server.transport.http.stream_routes import StreamRoutes

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from calotype_server.api.service import GenerationService

__all__ = ["calotype_routes"]

_Progress = create_model(
    "Progress",
    __base__=response_model(pb.Progress),
    image_url=(str, Field(None, description="With `images=url`: address of the image, instead of `image`.")),
)


def _json_response(message: type[Message]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": response_model(message), "description": "Success."}}


def calotype_routes(service: GenerationService) -> APIRouter:
    """Returns the routes.

    Args:
        service: Implements the operations.
    """
    routes = APIRouter(tags=["Calotype"])
    StreamRoutes(service).add_to(routes)
    _GenerationRoutes(service).add_to(routes)
    return routes


class _GenerationRoutes:
    """Routes that answer with one JSON object or one image."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service

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
            "/cancel",
            summary="Cancel a generation, or all generations of a group",
            responses=_json_response(pb.CancelResponse),
            dependencies=[Depends(require_json)],
        )(self.cancel_all)
        routes.post(
            "/generations/{generation_id}/finish",
            summary="Finish a generation early",
            responses=_json_response(pb.FinishResponse),
        )(self.finish)
        routes.get(
            "/generations/{generation_id}/preview/{sequence}",
            summary="The image of an event",
            responses=IMAGE_RESPONSES,
        )(self.preview)
        routes.get("/generations/{generation_id}/image", summary="The final image", responses=IMAGE_RESPONSES)(
            self.image
        )
        routes.get("/model", summary="The loaded model, its limits and defaults", responses=_json_response(pb.Model))(
            self.model
        )

    async def list_generations(self, request: Request) -> Response:
        """Lists active, queued and recently ended generations."""
        query = parse_query(pb.ListGenerationsRequest, query_fields(request))
        return _message_response(self._service.list_generations(query.value, caller_of(request), query.violations))

    async def state(self, request: Request, generation_id: GenerationId) -> Response:
        """Returns the newest `Progress`."""
        state = self._service.state(generation_id, caller_of(request))
        return JSONResponse(progress_json(state, "url", base_path(request)))

    async def cancel(self, request: Request, generation_id: GenerationId) -> Response:
        """Cancels a queued or active generation. Idempotent: `phase` is the phase it was in."""
        return _message_response(
            self._service.cancel(pb.CancelRequest(generation_id=generation_id), caller_of(request))
        )

    async def cancel_all(
        self, request: Request, body: Annotated[Parsed[pb.CancelRequest], Body(), Lenient(pb.CancelRequest)]
    ) -> Response:
        """Names of groups may contain any character, so they are in the body. Idempotent."""
        return _message_response(self._service.cancel(body.value, caller_of(request), body.violations))

    async def finish(self, request: Request, generation_id: GenerationId) -> Response:
        """Ends a generation after the current step. The current estimate becomes the final image."""
        return _message_response(
            self._service.finish(pb.FinishRequest(generation_id=generation_id), caller_of(request))
        )

    async def preview(
        self,
        request: Request,
        generation_id: GenerationId,
        sequence: Annotated[int, Path(description="From `Progress.sequence`.", ge=0, le=2**63 - 1)],
    ) -> Response:
        """Returns the newest preview, of that event or a later one; after the end, the final image."""
        image = await self._service.preview(generation_id, sequence, caller_of(request))
        return image_response(image, immutable=False)

    async def image(self, request: Request, generation_id: GenerationId) -> Response:
        """Returns the final image. Answers 404 with a retry delay while there is none yet."""
        return image_response(self._service.image(generation_id, caller_of(request)), immutable=True)

    async def model(self) -> Response:
        """Returns the same as `GetModel` over gRPC."""
        return _message_response(self._service.model())


def _message_response(message: Message) -> JSONResponse:
    return JSONResponse(as_json(message))
