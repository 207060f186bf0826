"""Stubs of the service over server-sent events and the WebSocket, with the interface of generated gRPC stubs.

The contract tests run over all of them. Their clients (httpx, httpx-sse, websockets) share no code with the server.
`ReconnectingEvents` behaves like a browser's EventSource.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import json_format
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from httpx_sse import EventSource
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from calotype.v1 import calotype_pb2 as pb

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

    import httpx
    from httpx_sse import ServerSentEvent

CODES = {code.value[0]: code for code in grpc.StatusCode}


def as_json(message: Any) -> dict[str, Any]:
    """Returns a message as JSON, as HTTP requests carry it."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def from_json(data: dict[str, Any], kind: Any = pb.Progress) -> Any:
    """Returns the message in JSON."""
    return json_format.ParseDict(data, kind())


def as_rpc_error(error: dict[str, Any]) -> grpc.aio.AioRpcError:
    """Returns the exception that a generated stub raises for an error."""
    details: list[Any] = [ErrorInfo(reason=error["code"], domain="calotype", metadata=error.get("metadata", {}))]
    if faults := error.get("violations"):
        details.append(BadRequest(field_violations=[BadRequest.FieldViolation(**fault) for fault in faults]))
    if "retry_after" in error:
        delay = Duration()
        delay.FromNanoseconds(round(error["retry_after"] * 1e9))
        details.append(RetryInfo(retry_delay=delay))
    code = grpc.StatusCode[error["status"]]
    status = Status(code=code.value[0], message=error["message"])
    for detail in details:
        packed = Packed()
        packed.Pack(detail)
        status.details.append(packed)
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, error["message"])


def as_ended(message: pb.Progress) -> grpc.aio.AioRpcError | None:
    """Returns the error with which gRPC ends a stream after this last message, or None."""
    if not message.HasField("error"):
        return None
    error = message.error
    described: dict[str, str | float] = {"message": error.message, "code": error.reason}
    described["status"] = CODES[error.code].name
    if error.HasField("retry_delay"):
        described["retry_after"] = error.retry_delay.ToNanoseconds() / 1e9
    return as_rpc_error(described)


class StreamCall:
    """A streaming call with the reading methods of `grpc.aio.UnaryStreamCall`. Subclasses implement the transport."""

    def __init__(self, timeout: float | None) -> None:
        self._until = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self._last: pb.Progress | None = None
        self._opening = asyncio.ensure_future(self.open())

    async def open(self) -> Any:
        """Sends the request and returns what `next` reads from."""
        raise NotImplementedError

    async def next(self, opened: Any) -> pb.Progress | None:
        """Returns the next message, or None at the end."""
        raise NotImplementedError

    def drop(self, opened: Any) -> None:
        """Drops the connection."""
        raise NotImplementedError

    async def read(self) -> Any:
        """Returns the next message, or EOF. Raises the error of a generation that ended without its image."""
        try:
            async with asyncio.timeout_at(self._until):
                message = await self.next(await asyncio.shield(self._opening))
        except TimeoutError:
            self.cancel()
            none = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, none, none) from None
        if message is not None:
            self._last = message
            return message
        assert self._last is not None
        assert self._last.phase >= pb.PHASE_SUCCEEDED, "the stream stopped without a typed end"
        if (error := as_ended(self._last)) is not None:
            raise error
        return grpc.aio.EOF

    def cancel(self) -> None:
        """Disconnects like a browser, by dropping the connection."""
        self._opening.cancel()
        if self._opening.done() and not self._opening.cancelled() and self._opening.exception() is None:
            self.drop(self._opening.result())

    async def __aiter__(self) -> AsyncIterator[pb.Progress]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message


class EventCall(StreamCall):
    """A call over server-sent events."""

    def __init__(self, client: httpx.AsyncClient, request: httpx.Request, timeout: float | None) -> None:
        self.client = client
        self._request = request
        self._closing: asyncio.Task[None] | None = None
        super().__init__(timeout)

    async def open(self) -> tuple[httpx.Response, AsyncIterator[Any]]:
        response = await self.client.send(self._request, stream=True)
        if response.status_code != 200:
            await response.aread()
            raise as_rpc_error(response.json()["error"])
        return response, EventSource(response).aiter_sse()

    async def next(self, opened: Any) -> pb.Progress | None:
        async for event in opened[1]:
            if event.event == "error":
                raise as_rpc_error(json.loads(event.data)["error"])
            message = from_json(json.loads(event.data))
            ended = message.phase >= pb.PHASE_SUCCEEDED
            assert event.event == ("end" if ended else "progress")
            assert event.id == f"{message.generation_id}:{'end' if ended else message.sequence}"
            return message
        return None

    def drop(self, opened: Any) -> None:
        self._closing = asyncio.ensure_future(opened[0].aclose())


class SocketCall(StreamCall):
    """One generation on its own WebSocket."""

    def __init__(self, opening: Any, command: dict[str, Any], timeout: float | None) -> None:
        self._socket = opening
        self._command = command
        super().__init__(timeout)

    async def open(self) -> Any:
        socket = await self._socket
        await socket.send(json.dumps({**self._command, "id": "a"}))
        return socket

    async def next(self, opened: Any) -> pb.Progress | None:
        if self._last is not None and self._last.phase >= pb.PHASE_SUCCEEDED:
            await opened.close()
            return None
        frame = await receive(opened)
        assert frame["id"] == "a"
        if frame["type"] == "error":
            await opened.close()
            raise as_rpc_error(frame["error"])
        assert frame["type"] == ("end" if frame["progress"].phase >= pb.PHASE_SUCCEEDED else "progress")
        return frame["progress"]

    def drop(self, opened: Any) -> None:
        opened.transport.abort()


async def open_socket(address: str, context: ssl.SSLContext | None = None, **options: Any) -> Any:
    """Opens a WebSocket to a server; over TLS with a context."""
    url = f"{'ws' if context is None else 'wss'}://{address}/v1/ws"
    return await connect(url, proxy=None, compression=None, max_size=None, ssl=context, **options)


async def receive(socket: Any) -> dict[str, Any]:
    """Returns the next frame of a WebSocket as JSON, including the image that follows it."""
    frame = json.loads(await socket.recv())
    if "progress" in frame:
        frame["progress"] = from_json(frame["progress"])
        if "image_bytes" in frame:
            frame["progress"].image = await socket.recv()
            assert len(frame["progress"].image) == frame["image_bytes"]
    return frame


class EventStub:
    """`GenerationServiceStub` over server-sent events and plain requests. Sends metadata as headers."""

    def __init__(self, client: httpx.AsyncClient, context: ssl.SSLContext | None = None) -> None:
        self.client = client
        self._context = context
        self._sockets: list[Any] = []

    async def aclose(self) -> None:
        """Closes all connections."""
        await self.client.aclose()
        await asyncio.gather(*(socket.close() for socket in self._sockets))

    def Generate(self, request: Any, timeout: float | None = None, metadata: Any = None) -> StreamCall:  # noqa: N802
        return self._stream("POST", "/generate", timeout, json=as_json(request), headers=metadata)

    def Watch(self, request: Any, timeout: float | None = None, metadata: Any = None) -> StreamCall:  # noqa: N802
        query = as_json(request)
        path = f"/generations/{query.pop('generation_id')}/events"
        flat = {f"preview.{name}": value for name, value in query.pop("preview", {}).items()} | query
        return self._stream("GET", path, timeout, params=flat, headers=metadata)

    async def Cancel(self, request: Any, metadata: Any = None) -> pb.CancelResponse:  # noqa: N802
        if request.group:
            return await self._ask("POST", "/cancel", pb.CancelResponse, json=as_json(request), headers=metadata)
        path = f"/generations/{request.generation_id}/cancel"
        return await self._ask("POST", path, pb.CancelResponse, headers=metadata)

    async def Finish(self, request: Any, metadata: Any = None) -> pb.FinishResponse:  # noqa: N802
        path = f"/generations/{request.generation_id}/finish"
        return await self._ask("POST", path, pb.FinishResponse, headers=metadata)

    async def ListGenerations(self, request: Any, metadata: Any = None) -> pb.ListGenerationsResponse:  # noqa: N802
        query = as_json(request)
        return await self._ask("GET", "/generations", pb.ListGenerationsResponse, params=query, headers=metadata)

    async def GetModel(self, request: pb.GetModelRequest, metadata: Any = None) -> pb.Model:  # noqa: N802
        return await self._ask("GET", "/model", pb.Model, headers=metadata)

    def _stream(self, method: str, path: str, timeout: float | None, **options: Any) -> StreamCall:
        return EventCall(self.client, self.client.build_request(method, path, **options), timeout)

    async def _ask(self, method: str, path: str, kind: Any, **options: Any) -> Any:
        response = await self.client.request(method, path, **options)
        if not response.is_success:
            raise as_rpc_error(response.json()["error"])
        return from_json(response.json(), kind)


class SocketStub(EventStub):
    """`EventStub` with the WebSocket for all commands that it has."""

    def Generate(self, request: Any, timeout: float | None = None, metadata: Any = None) -> StreamCall:  # noqa: N802
        command = {"type": "generate", "request": as_json(request)}
        return SocketCall(self._open(metadata), command, timeout)

    def Watch(self, request: Any, timeout: float | None = None, metadata: Any = None) -> StreamCall:  # noqa: N802
        return SocketCall(self._open(metadata), {"type": "watch", "request": as_json(request)}, timeout)

    async def Cancel(self, request: Any, metadata: Any = None) -> pb.CancelResponse:  # noqa: N802
        return await self._command("cancel", request, pb.CancelResponse, metadata)

    async def Finish(self, request: Any, metadata: Any = None) -> pb.FinishResponse:  # noqa: N802
        return await self._command("finish", request, pb.FinishResponse, metadata)

    async def _open(self, metadata: Any) -> Any:
        try:
            address = self.client.base_url.netloc.decode()
            socket = await open_socket(address, self._context, additional_headers=metadata)
            self._sockets.append(socket)
            return socket
        except InvalidStatus as rejected:
            raise as_rpc_error(json.loads(rejected.response.body)["error"]) from None

    async def _command(self, name: str, request: Any, kind: Any, metadata: Any) -> Any:
        async with await self._open(metadata) as socket:
            await socket.send(json.dumps({"type": name, "id": "b", "request": as_json(request)}))
            frame = json.loads(await socket.recv())
        if frame["type"] == "error":
            raise as_rpc_error(frame["error"])
        assert (frame.pop("type"), frame.pop("id")) == (name, "b")
        return from_json(frame, kind)


class ReconnectingEvents:
    """The part of an EventSource that reconnects, as the WHATWG specifies it, without its delays.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html

    Args:
        client: Sends the requests. The test may replace it before a reconnect, as after a restart of the server.
        path: Of the stream.
        before_reconnect: Awaited instead of the delay.
        params: The query.

    Attributes:
        client: As given.
        statuses: HTTP status of each connection.
        retry: Delay before a reconnect, in milliseconds, as last set by the server.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        path: str,
        before_reconnect: Callable[[], Awaitable[object]],
        **params: Any,
    ) -> None:
        self.client = client
        self.statuses: list[int] = []
        self.retry: int | None = None
        self._path = path
        self._params = params
        self._before_reconnect = before_reconnect
        self._last_id = ""

    async def __aiter__(self) -> AsyncIterator[ServerSentEvent]:
        """Yields all events until the server answers with another status than 200."""
        while True:
            headers = {"accept": "text/event-stream", "cache-control": "no-store"}
            if self._last_id:
                headers["last-event-id"] = self._last_id
            async with self.client.stream("GET", self._path, params=self._params, headers=headers) as response:
                self.statuses.append(response.status_code)
                if response.status_code != 200:
                    return
                async for event in EventSource(response).aiter_sse():
                    self._last_id = event.id or self._last_id
                    self.retry = event.retry or self.retry
                    yield event
            await self._before_reconnect()
