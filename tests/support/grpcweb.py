"""A grpc-web client for tests: the parts of `grpc.aio.Channel` that generated stubs need, over a real socket.

It parses HTTP with h11, which shares no code with the server's parser.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc
import h11

from calotype.v1.calotype_pb2_grpc import GenerationServiceStub

if TYPE_CHECKING:
    import ssl

CODES = {code.value[0]: code for code in grpc.StatusCode}


def frame(message: bytes, flags: int = 0) -> bytes:
    """Returns the frame of a message."""
    return struct.pack(">BI", flags, len(message)) + message


class Connection:
    """One HTTP/1.1 connection that can send arbitrary bytes, including invalid HTTP."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._parser = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(cls, address: str, context: ssl.SSLContext | None = None, local: str | None = None) -> Connection:
        """Connects, from the given address of this machine: each address in 127.0.0.0/8 stands for another host."""
        host, _, port = address.rpartition(":")
        source = None if local is None else (local, 0)
        opening = asyncio.open_connection(host, int(port), limit=4096, ssl=context, local_addr=source)
        return cls(*await opening)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def request(self, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> None:
        """Sends a request, or only its head if there is no body."""
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))

    def expect(self, method: str = "POST") -> None:
        """Prepares the parser for the response to a request of this method."""
        self._parser.send(h11.Request(method=method, target="/", headers=[("host", "x"), ("content-length", "0")]))
        self._parser.send(h11.EndOfMessage())

    def next_answer(self) -> None:
        """Prepares the parser for the response to the next request on this connection."""
        self._parser.start_next_cycle()
        self.expect()

    async def event(self):
        """Returns the next event of the response."""
        while (event := self._parser.next_event()) is h11.NEED_DATA:
            self._parser.receive_data(await self.reader.read(65536))
        return event

    async def answer(self, method: str = "POST") -> tuple[h11.Response, bytes]:
        """Returns the complete response."""
        self.expect(method)
        head = await self.event()
        body = b""
        while isinstance(event := await self.event(), h11.Data):
            body += event.data
        return head, body

    def close(self) -> None:
        """Drops the connection at once."""
        self.writer.transport.abort()


class Frames:
    """Splits a response into frames while it arrives."""

    def __init__(self, *, text: bool) -> None:
        self._text = text
        self._raw, self._data = b"", b""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Returns the flags and content of the frames that are now complete."""
        if self._text:
            self._raw += data
            whole, self._raw = self._raw[: len(self._raw) // 4 * 4], self._raw[len(self._raw) // 4 * 4 :]
            # Each frame is padded separately.
            self._data += b"".join(base64.b64decode(whole[i : i + 4], validate=True) for i in range(0, len(whole), 4))
        else:
            self._data += data
        frames = []
        while len(self._data) >= 5:
            flags, length = struct.unpack_from(">BI", self._data)
            if len(self._data) < 5 + length:
                break
            frames.append((flags, self._data[5 : 5 + length]))
            self._data = self._data[5 + length :]
        return frames


def parse_trailers(data: bytes) -> dict[str, Any]:
    """Returns the trailers of a call by name, with `-bin` values decoded."""
    trailers = {}
    for line in data.decode("ascii").splitlines():
        name, _, value = line.partition(": ")
        assert name == name.lower()
        trailers[name] = base64.b64decode(value + "==") if name.endswith("-bin") else value
    return trailers


def read_answer(answer: tuple[h11.Response, bytes], *, text: bool = False) -> tuple[list[bytes], dict[str, Any]]:
    """Returns the messages and trailers of a complete response; fails unless its HTTP status is 200."""
    head, body = answer
    assert head.status_code == 200, (head, body)
    frames = Frames(text=text).feed(body)
    assert [flags for flags, _ in frames] == [0] * (len(frames) - 1) + [0x80], frames
    return [data for _, data in frames[:-1]], parse_trailers(frames[-1][1])


def header_dict(head: h11.Response) -> dict[str, str]:
    """Returns the headers by name."""
    return {name.decode(): value.decode() for name, value in head.headers}


class WebCall:
    """A streaming call with the reading methods of `grpc.aio.UnaryStreamCall`."""

    def __init__(self, channel: WebChannel, path: str, body: bytes, metadata, timeout, decode) -> None:
        self._channel = channel
        self._decode = decode
        self._sending = asyncio.ensure_future(self._send(path, body, metadata, timeout))
        self._frames = Frames(text=channel.text)
        self._ready: list[tuple[int, bytes]] = []
        self._initial = grpc.aio.Metadata()

    async def _send(self, path: str, body: bytes, metadata, seconds) -> Connection:
        connection = await Connection.open(self._channel.address, self._channel.context, self._channel.local)
        self._channel.connections.append(connection)
        kind = "application/grpc-web" + ("-text" if self._channel.text else "") + "+proto"
        headers = {"host": self._channel.address, "content-type": kind, "x-grpc-web": "1", **dict(metadata or ())}
        if seconds is not None:
            headers["grpc-timeout"] = f"{int(seconds * 1000)}m"
        wire = frame(body)
        await connection.request("POST", path, headers, base64.b64encode(wire) if self._channel.text else wire)
        connection.expect()
        return connection

    async def _connection(self) -> Connection:
        return await asyncio.shield(self._sending)

    async def initial_metadata(self):
        """Returns the headers of the response. Call it only before the first read."""
        head = await (await self._connection()).event()
        assert isinstance(head, h11.Response), head
        assert head.status_code == 200, head
        for name, value in head.headers:
            self._initial.add(name.decode(), value.decode())
        return self._initial

    async def read(self):
        """Returns the next message, or EOF. Raises the status if it is not OK."""
        if not len(self._initial):
            await self.initial_metadata()
        connection = await self._connection()
        while not self._ready:
            event = await connection.event()
            assert isinstance(event, h11.Data), f"the response ended without trailers: {event!r}"
            self._ready = self._frames.feed(bytes(event.data))
        flags, data = self._ready.pop(0)
        if not flags & 0x80:
            return self._decode(data)
        assert not self._ready
        assert isinstance(await connection.event(), h11.EndOfMessage)
        connection.close()
        trailers = parse_trailers(data)
        code = CODES[int(trailers.pop("grpc-status"))]
        details = unquote(trailers.pop("grpc-message", ""))
        self._ready = [(flags, data)]
        if code is grpc.StatusCode.OK:
            self.trailers = grpc.aio.Metadata(*trailers.items())
            return grpc.aio.EOF
        raise grpc.aio.AioRpcError(code, self._initial, grpc.aio.Metadata(*trailers.items()), details)

    async def trailing_metadata(self):
        """Returns the metadata that came with the status. Call it only after EOF."""
        return self.trailers

    def cancel(self) -> None:
        """Disconnects like a browser, by dropping the connection."""
        self._sending.cancel()
        if self._sending.done() and not self._sending.cancelled():
            self._sending.result().close()

    async def __aiter__(self):
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message


class WebUnaryCall(WebCall):
    """A unary call."""

    def __await__(self):
        return self._only().__await__()

    async def _only(self):
        message = await self.read()
        assert message is not grpc.aio.EOF
        assert await self.read() is grpc.aio.EOF
        return message


class WebChannel:
    """The methods of a channel that generated stubs need."""

    def __init__(
        self, address: str, *, text: bool = False, context: ssl.SSLContext | None = None, local: str | None = None
    ) -> None:
        self.address = address
        self.local = local
        self.context = context
        self.text = text
        self.connections: list[Connection] = []

    def unary_stream(self, path: str, request_serializer=bytes, response_deserializer=bytes, _registered_method=False):
        """Returns a callable for a streaming method."""
        return self._method(WebCall, path, request_serializer, response_deserializer)

    def unary_unary(self, path: str, request_serializer=bytes, response_deserializer=bytes, _registered_method=False):
        """Returns a callable for a unary method."""
        return self._method(WebUnaryCall, path, request_serializer, response_deserializer)

    def stream_stream(self, path: str, *_, **__) -> None:
        """Returns None: browsers cannot stream requests."""

    def _method(self, kind, path: str, encode, decode):
        def call(request, *, timeout=None, metadata=None):
            return kind(self, path, encode(request), metadata, timeout, decode)

        return call

    def stub(self) -> Any:
        """Returns a generated stub that calls through this channel."""
        channel: Any = self
        return GenerationServiceStub(channel)

    def close(self) -> None:
        """Closes all connections."""
        for connection in self.connections:
            connection.close()
