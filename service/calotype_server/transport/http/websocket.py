"""A WebSocket: several generations at once, pictures as binary frames, and commands while they run.

Text frames are JSON objects. A client sends commands; `id` is the client's own name for what it starts or asks:

    {"type": "generate", "id": "a", "request": GenerateRequest}    then `progress` and `end` with this id
    {"type": "watch",    "id": "b", "request": WatchRequest}       likewise
    {"type": "leave",    "id": "a"}                                no more of it; `on_disconnect` says what follows
    {"type": "cancel",   "id": "c", "request": CancelRequest}      answered by the same with `phase`
    {"type": "finish",   "id": "d", "request": FinishRequest}      likewise

The server sends `{"type": "progress" | "end", "id", "progress": Progress}`, where `"image_bytes"` tells that the next
frame is binary and holds a picture of so many bytes, and `{"type": "error", "id", "error"}`. What cannot be understood
is answered by an error and harms nothing else.
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
from calotype_server.observability.events import CallRefused, Observe, ignore
from calotype_server.transport.http.callers import caller_of
from calotype_server.transport.http.parsing import parse, parse_message
from calotype_server.transport.http.problems import describe
from calotype_server.transport.http.schema import Given, Text, as_json
from calotype_server.transport.http.sse import event_name
from calotype_server.transport.net.credentials import peer_of

if TYPE_CHECKING:
    from calotype_server.api.service import Api, Following
    from calotype_server.transport.net.call_limits import CallLimiter

__all__ = ["MAX_STREAMS", "socket_routes"]

_log = structlog.get_logger(__name__)

MAX_STREAMS = 32
"""Generations that one WebSocket may carry at the same time."""

_UNSUPPORTED_DATA = 1003
_KINDS = ("generate", "watch", "leave", "cancel", "finish")


class _Command(Given):
    type: Literal["", "generate", "watch", "leave", "cancel", "finish"] = ""
    id: Annotated[Text, Field(max_length=128)] = ""
    request: dict[str, Any] = Field(default_factory=dict)


def socket_routes(api: Api, peers: CallLimiter, observe: Observe = ignore) -> APIRouter:
    """Returns the route.

    Args:
        api: Does what is asked for.
        peers: Counts what each has under way.
        observe: Told of refusals.
    """
    routes = APIRouter()

    @routes.websocket("/ws")
    async def connect(socket: WebSocket) -> None:
        # One that carries a key must not be sent back.
        offered = (each for each in socket.scope["subprotocols"] if bearer_in_subprotocols([each]) is None)
        await socket.accept(next(offered, None))
        await _Session(socket, api, peers, observe).run()

    return routes


class _Session:
    """One connection.

    Args:
        socket: Accepted.
        api: Does what is asked for.
        peers: Counts each generation that is followed as a call.
        observe: Told of refusals.
    """

    def __init__(self, socket: WebSocket, api: Api, peers: CallLimiter, observe: Observe) -> None:
        self._socket = socket
        self._api = api
        self._caller = caller_of(socket)
        self._peers = peers
        self._observe = observe
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Obeys until the client leaves; what it followed is then left."""
        try:
            while (received := await self._socket.receive())["type"] == "websocket.receive":
                if received.get("text") is None:
                    await self._socket.close(_UNSUPPORTED_DATA, "Commands are text.")
                    return
                await self._obey(received["text"])
        finally:
            streams = list(self._streams.values())
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _obey(self, text: str) -> None:
        name = ""
        try:
            command = parse(_Command, _decoded(text))
            name = command.value.id
            await self._carry_out(command.value, command.violations)
        except ServiceError as error:
            await self._refuse(name, error)

    async def _refuse(self, name: str, error: ServiceError) -> None:
        self._observe(CallRefused(error.reason))
        await self._send({"type": "error", "id": name, "error": describe(error)["error"]})

    async def _carry_out(self, command: _Command, violations: list[Violation]) -> None:
        if not command.type and not any(each.field == "type" for each in violations):
            violations.append(Violation("type", f"must be one of {', '.join(_KINDS)}"))
        if command.type in ("generate", "watch") and command.id in self._streams:
            violations.append(Violation("id", "is that of another generation which this connection follows"))
        if command.type == "leave" and command.id not in self._streams:
            violations.append(Violation("id", "is not that of a generation which this connection follows"))
        if violations:
            raise InvalidRequest(violations)
        match command.type:
            case "leave":
                self._streams[command.id].cancel()
            case "cancel":
                given = parse_message(pb.CancelRequest, command.request)
                _check(given.violations)
                await self._send(
                    {"type": "cancel", "id": command.id, **as_json(self._api.cancel(given.value, self._caller))}
                )
            case "finish":
                asked = parse_message(pb.FinishRequest, command.request)
                _check(asked.violations)
                await self._send(
                    {"type": "finish", "id": command.id, **as_json(self._api.finish(asked.value, self._caller))}
                )
            case _:
                if len(self._streams) >= MAX_STREAMS:
                    raise TooManyStreams(f"One connection follows up to {MAX_STREAMS} generations.", retry_after=1.0)
                self._streams[command.id] = asyncio.create_task(self._stream(command))

    async def _stream(self, command: _Command) -> None:
        """Sends all of one generation. A reader who is slow holds it up, and so gets the newest when it goes on."""
        try:
            with self._peers.admit(peer_of(self._socket.scope)):
                async with contextlib.aclosing(await self._begin(command)) as following:
                    async for message in following:
                        await self._tell(command.id, message)
        except ServiceError as error:
            await self._refuse(command.id, error)
        except WebSocketDisconnect:
            raise
        except Exception as error:
            _log.error("request failed", exc_info=error)
            await self._refuse(command.id, GenerationFailed("Internal error."))
        finally:
            del self._streams[command.id]

    async def _begin(self, command: _Command) -> Following:
        if command.type == "generate":
            asked = parse_message(pb.GenerateRequest, command.request)
            return await self._api.generate(asked.value, self._caller, whole=True, violations=asked.violations)
        watch = parse_message(pb.WatchRequest, command.request)
        return self._api.watch(watch.value, self._caller, whole=True, violations=watch.violations)

    async def _tell(self, name: str, message: pb.Progress) -> None:
        image = message.image
        message.ClearField("image")
        told: dict[str, Any] = {"type": event_name(message), "id": name, "progress": as_json(message)}
        if image:
            told["image_bytes"] = len(image)
        await self._send(told, image)

    async def _send(self, told: dict[str, Any], image: bytes = b"") -> None:
        async with self._sending:
            await self._socket.send_text(json.dumps(told, separators=(",", ":")))
            if image:
                await self._socket.send_bytes(image)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest([Violation("command", "must be JSON")]) from None


def _check(violations: list[Violation]) -> None:
    if violations:
        raise InvalidRequest(violations)
