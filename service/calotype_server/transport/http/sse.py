"""Server-sent events: a generation as a stream of them, and taking one up again."""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any, Literal

from sse_starlette import EventSourceResponse, ServerSentEvent

from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import InvalidRequest, ServiceError, Violation
from calotype_server.transport.http.problems import describe
from calotype_server.transport.http.schema import as_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from calotype_server.api.service import Following

__all__ = ["EventStream", "Images", "event", "event_name", "parse_last_event_id", "progress_events", "progress_json"]

Images = Literal["base64", "url"]

_HEARTBEAT_SECONDS = 15
"""Between comments that keep proxies from closing a stream in which nothing happens."""

_RECONNECT_MILLISECONDS = 1000
_EVENT_ID = re.compile(r"([\w.-]{1,128}):([0-9]{1,18})", re.ASCII)


class EventStream(EventSourceResponse):
    """Answers with events made of what is followed, and stops following when it is over or the client has left.

    Args:
        following: Closed in the end.
        events: What is told of it.
    """

    def __init__(self, following: Following, events: AsyncIterator[ServerSentEvent]) -> None:
        super().__init__(_with_refusal(events), sep="\n", ping=_HEARTBEAT_SECONDS)
        self._following = following

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the events."""
        async with contextlib.aclosing(self._following):
            await super().__call__(scope, receive, send)


async def _with_refusal(events: AsyncIterator[ServerSentEvent]) -> AsyncIterator[ServerSentEvent]:
    """Tells as an event what can no longer be told as a status."""
    try:
        async for each in events:
            yield each
    except ServiceError as error:
        yield event("error", describe(error))


async def progress_events(following: Following, images: Images, base: str) -> AsyncGenerator[ServerSentEvent, None]:
    """Yields an event `progress` for each message, and `end` for the last.

    Args:
        following: What is told.
        images: Whether they are inside, or where to get them.
        base: Of the URLs of images.
    """
    retry: int | None = _RECONNECT_MILLISECONDS
    async for message in following:
        place = f"{message.generation_id}:{message.sequence}"
        yield event(event_name(message), progress_json(message, images, base), id=place, retry=retry)
        retry = None


def event_name(message: pb.Progress) -> str:
    """Returns what a message is called where messages have names: the last one `end`, the others `progress`."""
    return "end" if message.phase >= pb.PHASE_SUCCEEDED else "progress"


def event(name: str, data: dict[str, Any], **further: Any) -> ServerSentEvent:
    """Returns an event with JSON for data, on one line."""
    return ServerSentEvent(json.dumps(data, separators=(",", ":")), event=name, sep="\n", **further)


def progress_json(message: pb.Progress, images: Images, base: str) -> dict[str, Any]:
    """Returns a message in its JSON form, where wanted with `image_url` in place of `image`."""
    if images == "url" and message.image:
        path = "image" if message.chunk_count else f"preview/{message.sequence}"
        message.ClearField("image")
        return as_json(message) | {"image_url": f"{base}/generations/{message.generation_id}/{path}"}
    return as_json(message)


def parse_last_event_id(given: str) -> tuple[str, int]:
    """Returns the generation and the number of the message that a client has seen last.

    Raises:
        InvalidRequest: It is not the id of an event of this server.
    """
    found = _EVENT_ID.fullmatch(given)
    if found is None:
        raise InvalidRequest([Violation("last-event-id", "must be GENERATION_ID:SEQUENCE, as in the ids of events")])
    return found[1], int(found[2])
