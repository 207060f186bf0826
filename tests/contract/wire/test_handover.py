"""A native port that stops sends its clients to another server with GOAWAY, and lets their active calls end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import pytest

from calotype_server.auth.access import Access
from calotype_server.limits import PortLimits
from calotype_server.transport.grpc import listening
from calotype_server.transport.grpc.options import server_options
from calotype_server.transport.grpc.server import NativeServer
from support.lab import NAME, PATIENCE, handlers
from support.service import opener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1
ANY_STREAM = 2**31 - 1
"""The last stream of a GOAWAY that announces the end of a connection but still accepts calls on their way."""


class Frame(NamedTuple):
    """A frame of HTTP/2."""

    kind: int
    flags: int
    payload: bytes


class RawConnection:
    """A connection that shows the frames of HTTP/2, which gRPC's clients hide."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: str) -> RawConnection:
        """Connects and sends the preface and empty settings."""
        host, _, port = address.rpartition(":")
        connection = cls(*await asyncio.open_connection(host, int(port)))
        connection._writer.write(PREFACE)
        connection._send(SETTINGS, 0, b"")
        return connection

    async def goaway(self) -> int:
        """Returns the last stream of the next GOAWAY, and answers pings meanwhile."""
        while (frame := await self._frame()).kind != GOAWAY:
            if frame.kind == PING and not frame.flags & ACK:
                self._send(PING, ACK, frame.payload)
        last_stream: int = struct.unpack(">I", frame.payload[:4])[0]
        return last_stream

    async def settings(self) -> None:
        """Returns when the server has accepted the connection."""
        while (await self._frame()).kind != SETTINGS:
            pass

    def close(self) -> None:
        """Closes the connection."""
        self._writer.close()

    async def _frame(self) -> Frame:
        head = await self._reader.readexactly(9)
        return Frame(head[3], head[4], await self._reader.readexactly(int.from_bytes(head[:3])))

    def _send(self, kind: int, flags: int, payload: bytes) -> None:
        self._writer.write(len(payload).to_bytes(3) + bytes((kind, flags)) + bytes(4) + payload)


class Port:
    """A native port whose method `Hold` streams one message, waits for `proceed`, and streams another.

    Attributes:
        address: HOST:PORT.
        server: The port.
        proceed: Lets `Hold` end.
    """

    def __init__(self, limits: PortLimits) -> None:
        self.address = ""
        self.proceed = asyncio.Event()
        self.server = NativeServer(self, Access(), limits=limits)  # type: ignore[arg-type]

    names = (NAME,)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the method."""

        async def hold(request: bytes, context: object) -> AsyncIterator[bytes]:
            yield b"first"
            await self.proceed.wait()
            yield b"last"

        async def echo(request: bytes, context: object) -> bytes:
            return request

        server.add_generic_rpc_handlers((handlers({"Hold": hold, "Echo": echo}),))


@contextlib.asynccontextmanager
async def port(**limits: float) -> AsyncIterator[Port]:
    """Opens a native port while the block runs."""
    opened = Port(PortLimits(**limits))  # type: ignore[arg-type]
    opened.address = await opened.server.start("127.0.0.1:0")
    async with asyncio.timeout(PATIENCE):
        try:
            yield opened
        finally:
            await opened.server.stop(0)


def held(channel: Any) -> Any:
    """Starts a call of `Hold`."""
    return channel.unary_stream(f"/{NAME}/Hold")(b"")


async def echoed(channel: Any, message: bytes) -> bytes:
    """Returns the answer of `Echo`."""
    answer: bytes = await channel.unary_unary(f"/{NAME}/Echo")(message)
    return answer


async def refuses(address: str) -> bool:
    """Returns whether nothing listens on an address; waits for a connection that was just accepted."""
    host, _, number = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(number))
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_draining_sends_goaway_and_completes_active_calls() -> None:
    """Clients learn that they must start new calls elsewhere; the port is closed, and an active stream continues."""
    async with port() as native, opener()(native.address, ()) as channel:
        raw = await RawConnection.open(native.address)
        await raw.settings()
        call = held(channel)
        assert await call.read() == b"first"
        await native.server.drain()
        assert await raw.goaway() == ANY_STREAM
        assert await refuses(native.address)
        native.proceed.set()
        assert await call.read() == b"last"
        assert await call.read() is grpc.aio.EOF
        raw.close()


async def test_active_calls_continue_until_the_port_stops() -> None:
    """Draining has no time limit of its own; `stop` sets the grace period."""
    async with port() as native, opener()(native.address, ()) as channel:
        call = held(channel)
        assert await call.read() == b"first"
        await native.server.drain()
        await native.server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_a_handover_time_connections_end_without_a_lost_call() -> None:
    """An open connection accepts calls after the port is closed, until GOAWAY ends it for new calls only."""
    async with port(handover_seconds=0.5) as native, opener()(native.address, ()) as channel:
        raw = await RawConnection.open(native.address)
        await raw.settings()
        running = held(channel)
        assert await running.read() == b"first"
        native.server.refuse_connections()
        assert await echoed(channel, b"late") == b"late"
        assert await refuses(native.address)
        assert await raw.goaway() == ANY_STREAM
        raw.close()
        native.proceed.set()
        assert await running.read() == b"last"
        assert await running.read() is grpc.aio.EOF


def test_only_a_handover_time_limits_the_age_of_connections() -> None:
    """Connections are renewed within that time; without one, they have no maximum age."""
    assert "grpc.max_connection_age_ms" not in dict(server_options(PortLimits()))
    assert dict(server_options(PortLimits(handover_seconds=10)))["grpc.max_connection_age_ms"] == 8000


async def test_only_the_port_of_the_server_is_closed() -> None:
    """Other ports of the process stay open, and no file descriptor is left behind."""
    async with port() as closing, port() as other:
        before = listening.listening_on(int(other.address.rpartition(":")[2]))
        closing.server.refuse_connections()
        assert await refuses(closing.address)
        assert not await refuses(other.address)
        assert listening.listening_on(int(other.address.rpartition(":")[2])) == before
        assert len(before) == 1


def test_looking_for_listeners_leaves_no_open_files() -> None:
    """Every file descriptor of the process is examined through a duplicate, which is closed."""
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        assert listening.listening_on(1) == frozenset()
    assert len(os.listdir("/dev/fd")) == before
