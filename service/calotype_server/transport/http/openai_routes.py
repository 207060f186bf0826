"""OpenAI's images API, so that its SDKs are clients: the part of it that has a meaning here."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Body, Path, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import InvalidRequest, Violation
from calotype_server.transport.http.callers import caller_of
from calotype_server.transport.http.openai_models import (
    Image,
    ImageEvent,
    ImagesRequest,
    ImagesResponse,
    ModelEntry,
    ModelList,
    Usage,
)
from calotype_server.transport.http.parsing import Lenient, Parsed
from calotype_server.transport.http.problems import describe
from calotype_server.transport.http.sse import EventStream, event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Sequence

    from sse_starlette import ServerSentEvent

    from calotype_server.api.service import Api, Following

__all__ = ["openai_routes"]

T = TypeVar("T")

_MAX_JPEG_QUALITY = 95
_MAX_EVERY_STEPS = 1000

_FORMATS = {"png": pb.IMAGE_FORMAT_PNG, "jpeg": pb.IMAGE_FORMAT_JPEG, "webp": pb.IMAGE_FORMAT_WEBP}
_NAMES: dict[int, Literal["png", "jpeg", "webp"]] = {
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_JPEG: "jpeg",
    pb.IMAGE_FORMAT_WEBP: "webp",
}
_FIELDS = {"width_px": "size", "height_px": "size", "output.quality": "output_compression"}
"""What the proto's fields are called here."""

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesResponse,
        "description": "With `stream`: events `image_generation.partial_image` and `image_generation.completed`, or "
        "`error`, whose data are an `ImageEvent` or a `Problem` in JSON.",
        "content": {"text/event-stream": {}},
    }
}


def openai_routes(api: Api) -> APIRouter:
    """Returns the routes.

    Args:
        api: Does what is asked for.
    """
    routes = APIRouter(tags=["OpenAI-compatible"])
    started = int(time.time())

    def loaded() -> ModelEntry:
        return ModelEntry(id=api.model().name, created=started)

    @routes.post("/images/generations", summary="Make images", responses=_ANSWERS)
    async def generate(
        request: Request, body: Annotated[Parsed[ImagesRequest], Body(), Lenient(ImagesRequest)]
    ) -> Response:
        """As OpenAI's SDKs call it. Fields that OpenAI does not have come by their `extra_body`."""
        wish, model = body.value, api.model()
        violations = [*body.violations, *_conflicts(wish, model)]
        async with contextlib.AsyncExitStack() as readers:
            followings = []
            for index in range(1 if violations else wish.n):
                try:
                    asked = _translated(wish, model, index)
                    following = await api.generate(asked, caller_of(request), whole=True, violations=violations)
                except InvalidRequest as error:
                    raise _renamed(error) from None
                followings.append(following)
                readers.push_async_callback(following.aclose)
            if wish.stream:
                readers.pop_all()
                return EventStream(followings[0], _events(followings[0], wish))
            images = await _unless_left(request, _images(followings))
        if images is None:
            return Response(status_code=499)
        size = f"{images[0].width_px}x{images[0].height_px}"
        data = [Image(b64_json=base64.b64encode(each.image).decode(), seed=each.seed) for each in images]
        answer = ImagesResponse(
            created=int(time.time()), data=data, output_format=wish.output_format, quality=_quality(wish), size=size
        )
        return JSONResponse(answer.model_dump())

    @routes.get("/models", summary="List the models: the one that is loaded", responses={200: {"model": ModelList}})
    async def models() -> Response:
        """`GET /v1/model` tells more."""
        return JSONResponse(ModelList(data=[loaded()]).model_dump())

    @routes.get("/models/{model:path}", summary="One model", responses={200: {"model": ModelEntry}})
    async def one_model(model: Annotated[str, Path(description="Its `id`.", pattern=r"^[^\x00-\x1f]+$")]) -> Response:
        """404 unless it is the one that is loaded."""
        if model != loaded().id:
            raise HTTPException(404, f"The loaded model is {loaded().id!r}; there is no other")
        return JSONResponse(loaded().model_dump())

    return routes


def _conflicts(wish: ImagesRequest, model: pb.Model) -> list[Violation]:
    """What is wrong with fields taken together, or with this model."""
    found = []
    if wish.model is not None and wish.model != model.name:
        found.append(Violation("model", f"must be {model.name!r}, the only one that is loaded"))
    if wish.stream and wish.n > 1:
        found.append(Violation("n", "must be 1 with stream"))
    if wish.partial_images and not wish.stream:
        found.append(Violation("partial_images", "needs stream"))
    return found


def _translated(wish: ImagesRequest, model: pb.Model, index: int) -> pb.GenerateRequest:
    """Returns the request for image number `index`."""
    request = pb.GenerateRequest(prompt=wish.prompt, output=pb.OutputOptions(format=_FORMATS[wish.output_format]))
    for name in ("negative_prompt", "step_count", "guidance_scale", "scheduler"):
        if (value := getattr(wish, name)) is not None:
            setattr(request, name, value)
    if wish.seed is not None:
        request.seed = wish.seed + index
    if wish.size != "auto":
        request.width_px, request.height_px = map(int, wish.size.split("x"))
    if wish.output_compression is not None:
        most = _MAX_JPEG_QUALITY if wish.output_format == "jpeg" else wish.output_compression
        request.output.quality = max(1, min(wish.output_compression, most))
    if wish.step_count is None:
        factor = {"low": 0.5, "high": 2.0}.get(_quality(wish), 1.0)
        request.step_count = max(1, min(int(model.step_count * factor), model.max_step_count))
    if wish.stream and wish.partial_images:
        # Evenly over the steps; the one that would be the last of them is the final image.
        every = max(1, request.step_count // (wish.partial_images + 1))
        request.preview.every_steps = min(every, _MAX_EVERY_STEPS)
    else:
        request.preview.method = pb.PREVIEW_METHOD_NONE
    return request


def _quality(wish: ImagesRequest) -> Literal["low", "medium", "high"]:
    if wish.quality in ("high", "hd"):
        return "high"
    return "low" if wish.quality == "low" else "medium"


def _renamed(error: InvalidRequest) -> InvalidRequest:
    return InvalidRequest([Violation(_FIELDS.get(v.field, v.field), v.description) for v in error.violations])


async def _events(following: Following, wish: ImagesRequest) -> AsyncGenerator[ServerSentEvent, None]:
    size = f"{following.generation.job.width}x{following.generation.job.height}"

    def told(
        kind: Literal["image_generation.partial_image", "image_generation.completed"],
        message: pb.Progress,
        **further: Any,
    ) -> ServerSentEvent:
        data = ImageEvent(
            type=kind,
            b64_json=base64.b64encode(message.image).decode(),
            created_at=int(time.time()),
            output_format=_NAMES[message.image_format],
            quality=_quality(wish),
            size=size,
            seed=message.seed,
            **further,
        )
        return event(data.type, data.model_dump(exclude_none=True))

    index = 0
    async for message in following:
        if message.image_kind == pb.IMAGE_KIND_FINAL:
            yield told("image_generation.completed", message, usage=Usage())
        elif message.image and index < (wish.partial_images or 0):
            yield told("image_generation.partial_image", message, partial_image_index=index)
            index += 1
    if following.failure is not None:
        yield event("error", describe(following.failure))


async def _images(followings: Sequence[Following]) -> list[pb.Progress]:
    """Returns the last message of each; the first that fails raises."""

    async def last(following: Following) -> pb.Progress:
        async for message in following:
            found = message
        if following.failure is not None:
            raise following.failure
        return found

    return await asyncio.gather(*map(last, followings))


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns what `work` returns, or None as soon as the client has left."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait({working, leaving})
