"""A WebSocket: several generations at the same time, images as binary frames, and commands while they run.

Text frames are JSON objects. The client sends commands; `id` is its own name for a generation or a command:

    {"type": "generate", "id": "a", "request": GenerateRequest}    answered by `progress` and `end` with this id
    {"type": "watch",    "id": "b", "request": WatchRequest}       answered in the same way
    {"type": "leave",    "id": "a"}                                stops messages; `on_disconnect` decides what follows
    {"type": "cancel",   "id": "c", "request": CancelRequest}      answered by the same type with `CancelResponse`
    {"type": "finish",   "id": "d", "request": FinishRequest}      answered by the same type with `FinishResponse`

The server sends `{"type": "progress" | "end", "id", "progress": Progress}`. With `"image_bytes"` in it, the next frame
is binary and contains an image of that size. Errors are `{"type": "error", "id", "error"}`. An invalid command is
answered with an error and affects nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import structlog
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import Field

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import bearer_in_subprotocols
from calotype_server.errors import GenerationFailed, InvalidRequest, ServiceError, TooManyStreams, Violation
from calotype_server.failpoints import hit
from calotype_server.observability.events import CallRefused, Observe, ignore
from calotype_server.transport.http.callers import caller_of
from calotype_server.transport.http.generation_stream import generation_stream
from calotype_server.transport.http.parsing import Parsed, parse, parse_message
from calotype_server.transport.http.problems import describe
from calotype_server.transport.http.schema import RequestModel, Text, as_json
from calotype_server.transport.http.sse import event_name
from calotype_server.transport.net.credentials import peer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from calotype_server.api.service import GenerationService
    from calotype_server.transport.net.call_limits import CallLimiter

__all__ = ["MAX_STREAMS", "websocket_routes"]

_log = structlog.get_logger(__name__)

MAX_STREAMS = 32
"""Largest number of generations that one WebSocket can follow at the same time."""

_UNSUPPORTED_DATA = 1003
_COMMANDS = ("generate", "watch", "leave", "cancel", "finish")


class _Command(RequestModel):
    type: Literal["", "generate", "watch", "leave", "cancel", "finish"] = ""
    id: Annotated[Text, Field(max_length=128)] = ""
    request: dict[str, Any] = Field(default_factory=dict)


def websocket_routes(service: GenerationService, call_limiter: CallLimiter, observe: Observe = ignore) -> APIRouter:
    """Returns the route.

    Args:
        service: Implements the operations.
        call_limiter: Counts each followed generation as a call of its host.
        observe: Receives an event for each rejected command.
    """
    routes = APIRouter()

    @routes.websocket("/ws")
    async def connect(socket: WebSocket) -> None:
        # The accepted subprotocol is sent back, so one that carries a key is never accepted.
        offered = (each for each in socket.scope["subprotocols"] if bearer_in_subprotocols([each]) is None)
        await socket.accept(next(offered, None))
        await _Session(socket, service, call_limiter, observe).run()

    return routes


class _Session:
    """One WebSocket connection and its generations.

    Args:
        socket: Accepted.
        service: Implements the operations.
        call_limiter: Counts each followed generation as a call of its host.
        observe: Receives an event for each rejected command.
    """

    def __init__(
        self, socket: WebSocket, service: GenerationService, call_limiter: CallLimiter, observe: Observe
    ) -> None:
        self._socket = socket
        self._service = service
        self._caller = caller_of(socket)
        self._call_limiter = call_limiter
        self._observe = observe
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._send_lock = asyncio.Lock()

    async def run(self) -> None:
        """Executes commands until the client disconnects, and then stops stream all generations."""
        try:
            # Sending to a client that has just disconnected raises.
            with contextlib.suppress(WebSocketDisconnect):
                while (received := await self._socket.receive())["type"] == "websocket.receive":
                    if received.get("text") is None:
                        await self._socket.close(_UNSUPPORTED_DATA, "Commands must be text frames.")
                        return
                    await self._handle(received["text"])
        finally:
            streams = list(self._streams.values())
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _handle(self, text: str) -> None:
        command_id = ""
        try:
            command = parse(_Command, _from_json(text))
            command_id = command.value.id
            self._check(command.value, command.violations)
            await self._execute(command.value)
        except ServiceError as error:
            await self._send_error(command_id, error)

    def _check(self, command: _Command, violations: list[Violation]) -> None:
        """Raises `InvalidRequest` with the given violations and those of this connection's state."""
        if not command.type and not any(each.field == "type" for each in violations):
            violations.append(Violation("type", f"must be one of {', '.join(_COMMANDS)}"))
        if command.type in ("generate", "watch") and command.id in self._streams:
            violations.append(Violation("id", "is in use for another generation on this connection"))
        if command.type == "leave" and command.id not in self._streams:
            violations.append(Violation("id", "is not the id of a generation that this connection follows"))
        _reject(violations)

    async def _execute(self, command: _Command) -> None:
        match command.type:
            case "leave":
                self._streams[command.id].cancel()
            case "cancel":
                await self._answer(command, parse_message(pb.CancelRequest, command.request), self._service.cancel)
            case "finish":
                await self._answer(command, parse_message(pb.FinishRequest, command.request), self._service.finish)
            case _:
                if len(self._streams) >= MAX_STREAMS:
                    raise TooManyStreams(
                        f"One connection can follow at most {MAX_STREAMS} generations.", retry_after=1.0
                    )
                self._streams[command.id] = asyncio.create_task(self._stream(command))

    async def _answer(self, command: _Command, parsed: Parsed[Any], method: Callable[..., Message]) -> None:
        """Calls a method that returns one message, and sends it."""
        _reject(parsed.violations)
        await self._send({"type": command.type, "id": command.id, **as_json(method(parsed.value, self._caller))})

    async def _stream(self, command: _Command) -> None:
        """Sends all messages of a generation. A slow reader delays sending, and skips to the newest preview."""
        # `run` notices a disconnect by itself.
        with contextlib.suppress(WebSocketDisconnect):
            await self._send_stream(command)

    async def _send_stream(self, command: _Command) -> None:
        try:
            message_type: Any = pb.GenerateRequest if command.type == "generate" else pb.WatchRequest
            parsed: Parsed[Any] = parse_message(message_type, command.request)
            with self._call_limiter.admit(peer_of(self._socket.scope)):
                async with generation_stream(self._service, parsed, self._caller) as stream:
                    async for message in stream:
                        hit("http.message")
                        await self._send_progress(command.id, message)
        except ServiceError as error:
            await self._send_error(command.id, error)
        except (WebSocketDisconnect, asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            _log.error("request failed", exc_info=error)
            await self._send_error(command.id, GenerationFailed("Internal error."))
        finally:
            del self._streams[command.id]

    async def _send_error(self, command_id: str, error: ServiceError) -> None:
        self._observe(CallRefused(error.reason))
        await self._send({"type": "error", "id": command_id, "error": describe(error)["error"]})

    async def _send_progress(self, command_id: str, message: pb.Progress) -> None:
        image = message.image
        message.ClearField("image")
        frame: dict[str, Any] = {"type": event_name(message), "id": command_id, "progress": as_json(message)}
        if image:
            frame["image_bytes"] = len(image)
        await self._send(frame, image)

    async def _send(self, frame: dict[str, Any], image: bytes = b"") -> None:
        async with self._send_lock:
            await self._socket.send_text(json.dumps(frame, separators=(",", ":")))
            if image:
                await self._socket.send_bytes(image)


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest([Violation("command", "must be JSON")]) from None


def _reject(violations: list[Violation]) -> None:
    if violations:
        raise InvalidRequest(violations)
