"""A FastAPI back end that relays generations to browsers as server-sent events.

Usage::

    pip install calotype fastapi uvicorn
    uvicorn relay:app                                              # then open http://localhost:8000
    curl -N 'http://localhost:8000/images?prompt=a+red+apple'

Events: `progress`, with a data URL if there is a new preview; at the end `image` with the final image, or `failure`. A
request that the server rejects gets status 422 with every violation. When the browser disconnects, the generation is
cancelled.
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
    """Uses one client for all requests."""
    address = os.environ.get("CALOTYPE_GRPC_ADDRESS", "localhost:50051")
    # A large model may load for minutes. The browser gets an error instead of an empty page for so long.
    async with AsyncClient(address, loading_timeout=10) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


async def start(request: Request, prompt: str, steps: int | None = None) -> AsyncIterator[Started]:
    """Starts a generation and waits for its first message, while an error can still set the status of the response."""
    # FastAPI leaves this block at the end of the response, also when the browser disconnects: that cancels.
    async with request.app.state.client.generate(prompt, steps=steps) as generation:
        messages = aiter(generation)
        try:
            first = await anext(messages)
        except InvalidRequest as error:
            raise HTTPException(422, [violation._asdict() for violation in error.violations]) from None
        except CalotypeError as error:
            raise HTTPException(503, str(error)) from None

        async def all_messages() -> AsyncIterator[Progress]:
            yield first
            async for progress in messages:
                yield progress

        yield generation, all_messages()


@app.get("/images", response_class=EventSourceResponse)
async def images(started: Annotated[Started, Depends(start)]) -> AsyncIterator[ServerSentEvent]:
    """Streams the progress of a generation, and its image."""
    generation, messages = started
    try:
        async for progress in messages:
            event = {"phase": progress.phase, "step": progress.step, "total_steps": progress.total_steps}
            if progress.preview:
                event["preview"] = data_url(progress.preview)
            yield ServerSentEvent(data=event, event="progress")
        yield ServerSentEvent(data={"image": data_url(await generation.result())}, event="image")
    except CalotypeError as error:
        yield ServerSentEvent(data={"reason": error.reason, "message": str(error)}, event="failure")


def data_url(image: Image) -> str:
    """Converts an image to a URL for <img>."""
    return f"data:image/{image.format};base64,{base64.b64encode(image.data).decode()}"


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    """Returns a page that shows one generation."""
    return """<!doctype html><meta charset="utf-8"><title>A red apple</title><img width="256" alt=""><p>
<script>
  const [image, text] = [document.querySelector("img"), document.querySelector("p")];
  const source = new EventSource("/images?prompt=a+red+apple");
  source.addEventListener("progress", ({ data }) => {
    const { phase, step, total_steps, preview } = JSON.parse(data);
    text.textContent = `${phase} ${step}/${total_steps}`;
    if (preview) image.src = preview;
  });
  // Close at the end: an EventSource would otherwise reconnect and start another generation.
  source.addEventListener("image", ({ data }) => { source.close(); image.src = JSON.parse(data).image; });
  source.addEventListener("failure", ({ data }) => { source.close(); text.textContent = JSON.parse(data).message; });
</script>"""
