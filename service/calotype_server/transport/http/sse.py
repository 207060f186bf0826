"""Server-sent events: encodes a generation as events, and resumes from the id of the last one."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any, Literal

import structlog
from pydantic_core import to_json
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import Draining, GenerationFailed, InvalidRequest, ServiceError, Violation
from calotype_server.failpoints import hit
from calotype_server.transport.http.problems import describe, waiting_event
from calotype_server.transport.http.schema import as_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from contextlib import AsyncExitStack

    from calotype_server.api.progress_stream import ProgressStream

__all__ = [
    "GENERATION_ID",
    "KEEPALIVE_SECONDS",
    "EventStream",
    "Images",
    "empty_event_stream",
    "event",
    "event_name",
    "parse_last_event_id",
    "progress_events",
    "progress_json",
]

_log = structlog.get_logger(__name__)

Images = Literal["base64", "url"]

KEEPALIVE_SECONDS = 15
"""Between comments, which keep proxies from closing a quiet stream."""

GENERATION_ID = r"[A-Za-z0-9._-]{1,128}"
"""Pattern of a generation id."""

_RECONNECT_MILLISECONDS = 1000
_END = "end"
_EVENT_ID = re.compile(rf"({GENERATION_ID}):([0-9]{{1,18}}|{_END})")


class EventStream(EventSourceResponse):
    """A response of server-sent events.

    Args:
        events: Of a generation.
        resources: Closed when the events end or the client disconnects; contains the stream that `events` reads.
    """

    def __init__(self, events: AsyncIterator[ServerSentEvent], resources: AsyncExitStack) -> None:
        super().__init__(_with_error_event(events), sep="\n", ping=KEEPALIVE_SECONDS)
        self._resources = resources

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the events."""
        async with self._resources:
            await super().__call__(scope, receive, send)


def empty_event_stream() -> Response:
    """Returns the response to a HEAD request for a stream."""
    response = Response(media_type="text/event-stream", headers={"cache-control": "no-store"})
    del response.headers["content-length"]
    return response


async def _with_error_event(events: AsyncIterator[ServerSentEvent]) -> AsyncIterator[ServerSentEvent]:
    """Adds an event for an error that occurs after the HTTP status was sent."""
    try:
        async for each in events:
            yield each
    except ServiceError as error:
        yield event("error", describe(error))
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        _log.error("request failed", exc_info=error)
        yield event("error", describe(GenerationFailed("Internal error.")))


async def progress_events(
    stream: ProgressStream, images: Images, base: str, *, reconnects: bool = False
) -> AsyncGenerator[ServerSentEvent, None]:
    """Yields a `progress` event for each message, and `end` for the last one.

    Args:
        stream: The messages of a generation.
        images: Whether images are inside the events or referenced by URL.
        base: Path under which the API is mounted, for these URLs.
        reconnects: Whether the client reconnects by itself. If the generation ends only because the server stops, it
            gets `waiting` instead of `end`, because the generation continues or restarts when it reconnects.
    """
    retry: int | None = _RECONNECT_MILLISECONDS
    async for message in stream:
        hit("http.message")
        name = event_name(message)
        if reconnects and name == _END and isinstance(stream.failure, Draining):
            yield waiting_event(stream.failure)
            return
        # The end has an id of its own, because a log that was lost and restarted may end with any number.
        event_id = f"{message.generation_id}:{_END if name == _END else message.sequence}"
        yield event(name, progress_json(message, images, base), id=event_id, retry=retry)
        retry = None


def event_name(message: pb.Progress) -> str:
    """Returns the name of the event for a message: `end` for the last one, otherwise `progress`."""
    return _END if message.phase >= pb.PHASE_SUCCEEDED else "progress"


def event(name: str, data: dict[str, Any], **fields: Any) -> ServerSentEvent:
    """Returns an event whose data is JSON on one line.

    Args:
        name: Of the event.
        data: Encoded as JSON.
        fields: Further fields of the event, such as `id` and `retry`.
    """
    return _JsonEvent(to_json(data), event=name, **fields)


class _JsonEvent(ServerSentEvent):
    """An event whose data is JSON as bytes.

    The library searches the data for line breaks, which JSON does not have, and copies it several times. With a final
    image in it, that would block the event loop for many milliseconds.
    """

    def __init__(self, content: bytes, **fields: Any) -> None:
        super().__init__(sep="\n", **fields)
        self._content = content

    def encode(self) -> bytes:
        """Returns the event as it is sent."""
        # The other fields end with an empty line, which would end the event.
        return b"".join([super().encode()[:-1], b"data: ", self._content, b"\n\n"])


def progress_json(message: pb.Progress, images: Images, base: str) -> dict[str, Any]:
    """Returns a message as JSON; arguments as for `progress_events`. Clears `image` of the message for "url"."""
    if images == "url" and message.image:
        path = "image" if message.chunk_count else f"preview/{message.sequence}"
        message.ClearField("image")
        return as_json(message) | {"image_url": f"{base}/generations/{message.generation_id}/{path}"}
    return as_json(message)


def parse_last_event_id(given: str) -> tuple[str, int | None]:
    """Returns the generation id and the sequence number in the id of the last event that a client received.

    The sequence number is None for the id of an `end`.

    Raises:
        InvalidRequest: It is not the id of an event of this API.
    """
    found = _EVENT_ID.fullmatch(given)
    if found is None:
        form = f"must be GENERATION_ID:SEQUENCE or GENERATION_ID:{_END}, as in the ids of events"
        raise InvalidRequest([Violation("last-event-id", form)])
    return found[1], None if found[2] == _END else int(found[2])
