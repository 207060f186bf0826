"""A back end that relays pictures to browsers as server-sent events, with FastAPI.

Usage::

    pip install calotype fastapi uvicorn
    uvicorn relay:app                                              # and open http://localhost:8000
    curl -N 'http://localhost:8000/pictures?prompt=a+red+apple'

Events: `progress`, with a data URL when there is a new preview; then `picture` with the final one, or `failure`. What
the server refuses is a 422 that names every violation. A browser that leaves cancels its generation.
"""

import base64
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, TypeAlias

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from calotype import AsyncClient, AsyncGeneration, CalotypeError, Image, InvalidRequest, Progress

Started: TypeAlias = tuple[AsyncGeneration, AsyncIterator[Progress]]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keeps one connection for all requests."""
    async with AsyncClient(os.environ.get("CALOTYPE_GRPC_ADDRESS", "localhost:50051")) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


async def start(request: Request, prompt: str, steps: int | None = None) -> AsyncIterator[Started]:
    """Starts a generation before the response begins, so that a refusal can still have a status of its own."""
    # Left when the response is over, also because the browser has gone: that cancels.
    async with request.app.state.client.generate(prompt, steps=steps) as generation:
        messages = aiter(generation)
        try:
            first = await anext(messages)
        except InvalidRequest as error:
            raise HTTPException(422, [violation._asdict() for violation in error.violations]) from None
        except CalotypeError as error:
            raise HTTPException(503, str(error)) from None

        async def rejoined() -> AsyncIterator[Progress]:
            yield first
            async for progress in messages:
                yield progress

        yield generation, rejoined()


@app.get("/pictures", response_class=EventSourceResponse)
async def pictures(started: Annotated[Started, Depends(start)]) -> AsyncIterator[ServerSentEvent]:
    """Streams a picture while it forms."""
    generation, messages = started
    try:
        async for progress in messages:
            told = {"phase": progress.phase, "step": progress.step, "total_steps": progress.total_steps}
            if progress.preview:
                told["preview"] = data_url(progress.preview)
            yield ServerSentEvent(data=told, event="progress")
        yield ServerSentEvent(data={"picture": data_url(await generation.result())}, event="picture")
    except CalotypeError as error:
        yield ServerSentEvent(data={"reason": error.reason, "message": str(error)}, event="failure")


def data_url(image: Image) -> str:
    """What an <img> shows."""
    return f"data:image/{image.format};base64,{base64.b64encode(image.data).decode()}"


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    """A browser's part of it."""
    return """<!doctype html><meta charset="utf-8"><title>A red apple</title><img width="256" alt=""><p>
<script>
  const [image, text] = [document.querySelector("img"), document.querySelector("p")];
  const source = new EventSource("/pictures?prompt=a+red+apple");
  source.addEventListener("progress", ({ data }) => {
    const { phase, step, total_steps, preview } = JSON.parse(data);
    text.textContent = `${phase} ${step}/${total_steps}`;
    if (preview) image.src = preview;
  });
  // Closed at the end: an EventSource would ask for another picture.
  source.addEventListener("picture", ({ data }) => { source.close(); image.src = JSON.parse(data).picture; });
  source.addEventListener("failure", ({ data }) => { source.close(); text.textContent = JSON.parse(data).message; });
</script>"""
