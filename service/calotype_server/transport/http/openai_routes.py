"""OpenAI's images API, so that its SDKs work as clients: the parts that Calotype can implement."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, Path, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Caller
from calotype_server.errors import ImageNotFound, InvalidRequest
from calotype_server.transport.http.callers import caller_of
from calotype_server.transport.http.media import require_json
from calotype_server.transport.http.openai_models import (
    Image,
    ImageEvent,
    ImagesRequest,
    ImagesResponse,
    ImageWarning,
    ModelEntry,
    ModelList,
    Usage,
)
from calotype_server.transport.http.openai_translation import (
    conflicts,
    file_format,
    image_warnings,
    quality_of,
    to_generate_request,
    warning_headers,
    with_openai_names,
)
from calotype_server.transport.http.parsing import Lenient, Parsed
from calotype_server.transport.http.problems import describe
from calotype_server.transport.http.request_parts import IMAGE_RESPONSES, GenerationId, base_path, image_response
from calotype_server.transport.http.sse import EventStream, event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Sequence

    from sse_starlette import ServerSentEvent

    from calotype_server.api.progress_stream import ProgressStream
    from calotype_server.api.service import GenerationService
    from calotype_server.transport.http.image_links import ImageLinks

__all__ = ["openai_routes"]

T = TypeVar("T")

_CLIENT_CLOSED_REQUEST = 499

_LINK = Caller("image-link")
"""Fetches an image by its address, which proves that it may: the address contains a token."""

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesResponse,
        "description": "With `stream`: events `image_generation.partial_image` and `image_generation.completed`, or "
        "`error`. Their data is an `ImageEvent` or a `Problem` in JSON.",
        "content": {"text/event-stream": {}},
    }
}


def openai_routes(service: GenerationService, links: ImageLinks) -> APIRouter:
    """Returns the routes.

    Args:
        service: Implements the operations.
        links: Makes and checks the addresses of images.
    """
    routes = APIRouter(tags=["OpenAI-compatible"])
    images, models = _ImageRoutes(service, links), _ModelRoutes(service)
    routes.post(
        "/images/generations",
        summary="Generate images",
        responses=_RESPONSES,
        dependencies=[Depends(require_json)],
    )(images.generate)
    routes.get(
        "/images/{generation_id}/{token}", summary="An image by the address in a response", responses=IMAGE_RESPONSES
    )(images.linked)
    routes.get("/models", summary="List the models: the loaded one", responses={200: {"model": ModelList}})(
        models.models
    )
    routes.get("/models/{model:path}", summary="One model", responses={200: {"model": ModelEntry}})(models.one_model)
    return routes


class _ImageRoutes:
    """The routes that generate images, and return them by their addresses."""

    def __init__(self, service: GenerationService, links: ImageLinks) -> None:
        self._service = service
        self._links = links

    async def generate(
        self, request: Request, body: Annotated[Parsed[ImagesRequest], Body(), Lenient(ImagesRequest)]
    ) -> Response:
        """Called by OpenAI's SDKs. Pass fields that OpenAI does not have in their `extra_body`."""
        async with contextlib.AsyncExitStack() as resources:
            streams = await self._start(body, request, resources)
            if body.value.stream:
                return EventStream(_image_events(streams[0], body.value), resources.pop_all())
            images = await _unless_disconnected(request, _final_messages(streams))
        if images is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        if body.value.response_format == "url":
            described = [Image(url=self._link(each, request), seed=each.seed) for each in images]
        else:
            described = [Image(b64_json=base64.b64encode(each.image).decode(), seed=each.seed) for each in images]
        size = f"{images[0].width_px}x{images[0].height_px}"
        warnings = image_warnings(images)
        response = _images_response(described, body.value, size, warnings).model_dump_json(exclude_none=True)
        return Response(response, media_type="application/json", headers=warning_headers(warnings))

    async def linked(
        self,
        generation_id: GenerationId,
        token: Annotated[str, Path(description="Cannot be guessed.", pattern="^[0-9a-f]{64}$")],
    ) -> Response:
        """Needs no key. Answers 404 when the server no longer retains the image, and after a restart."""
        if not self._links.is_valid(f"/images/{generation_id}/{token}"):
            raise ImageNotFound("There is no image with this address.")
        return image_response(self._service.image(generation_id, _LINK), immutable=True)

    def _link(self, image: pb.Progress, request: Request) -> str:
        url = request.url
        return f"{url.scheme}://{url.netloc}{base_path(request)}{self._links.path(image.generation_id)}"

    async def _start(
        self, body: Parsed[ImagesRequest], request: Request, resources: contextlib.AsyncExitStack
    ) -> list[ProgressStream]:
        """Starts one generation for each image, or none; `resources` closes them.

        Raises:
            InvalidRequest: With all violations, under OpenAI's field names.
        """
        asked, model = body.value, self._service.model()
        violations = [*body.violations, *conflicts(asked, model)]
        # An invalid request is sent once, so that validation adds its own violations.
        requests = [to_generate_request(asked, model, index) for index in range(1 if violations else asked.n)]
        opening = self._service.generate_all(requests, caller_of(request), whole=True, violations=violations)
        try:
            return await resources.enter_async_context(opening)
        except InvalidRequest as error:
            raise with_openai_names(error) from None


class _ModelRoutes:
    """The routes that describe the loaded model."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service
        self._created = int(time.time())

    async def models(self) -> Response:
        """`GET /v1/model` returns more details."""
        return JSONResponse(ModelList(data=[self._loaded()]).model_dump())

    async def one_model(
        self, model: Annotated[str, Path(description="Its `id`.", pattern=r"^[^\x00-\x1f]+$")]
    ) -> Response:
        """Answers 404 unless it is the loaded model."""
        loaded = self._loaded()
        if model != loaded.id:
            raise HTTPException(404, f"The only model is {loaded.id!r}")
        return JSONResponse(loaded.model_dump())

    def _loaded(self) -> ModelEntry:
        model = self._service.model()
        sizes = [f"{size.width_px}x{size.height_px}" for size in model.sizes]
        return ModelEntry(id=model.name, created=self._created, sizes=sizes)


def _images_response(
    images: list[Image], request: ImagesRequest, size: str, warnings: list[ImageWarning]
) -> ImagesResponse:
    return ImagesResponse(
        created=int(time.time()),
        data=images,
        output_format=request.output_format,
        quality=quality_of(request),
        size=size,
        warnings=warnings,
    )


async def _image_events(stream: ProgressStream, request: ImagesRequest) -> AsyncGenerator[ServerSentEvent, None]:
    """Yields an event for each preview and for the final image, or an error."""
    width, height = stream.generation.job.output_size
    size = f"{width}x{height}"
    index = 0
    async for message in stream:
        if message.image_kind == pb.IMAGE_KIND_FINAL:
            yield _image_event(
                "image_generation.completed",
                message,
                request,
                size,
                usage=Usage(),
                warnings=image_warnings([message]),
            )
        elif message.image and index < (request.partial_images or 0):
            yield _image_event("image_generation.partial_image", message, request, size, partial_image_index=index)
            index += 1
    if stream.failure is not None:
        yield event("error", describe(stream.failure))


def _image_event(kind: Any, message: pb.Progress, request: ImagesRequest, size: str, **fields: Any) -> ServerSentEvent:
    data = ImageEvent(
        type=kind,
        b64_json=base64.b64encode(message.image).decode(),
        created_at=int(time.time()),
        output_format=file_format(message),
        quality=quality_of(request),
        size=size,
        seed=message.seed,
        **fields,
    )
    return event(data.type, data.model_dump(exclude_none=True))


async def _final_messages(streams: Sequence[ProgressStream]) -> list[pb.Progress]:
    """Returns the last message of each generation.

    Raises:
        GenerationError: The first of them that failed.
    """

    async def final_message(stream: ProgressStream) -> pb.Progress:
        async for message in stream:
            last = message
        if stream.failure is not None:
            raise stream.failure
        return last

    return await asyncio.gather(*map(final_message, streams))


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns the result of `work`, or None as soon as the client disconnects, which cancels `work`."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.wait({working, watching})
