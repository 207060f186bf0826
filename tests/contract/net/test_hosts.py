"""Hosts share the connections of the web port. Each address in 127.0.0.0/8 stands for another host."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.limits import PORT_LIMITS, SIDE_PORT_LIMITS, PortLimits
from calotype_server.transport.net.open_files import raise_open_file_limit
from calotype_server.transport.web.probes import serve_probes
from support.authority import Authority
from support.engine.fake_engine import FakeEngine
from support.grpcweb import Connection, WebChannel
from support.http import open_socket, receive
from support.lab import PATIENCE, until
from support.service import read_until, running

if TYPE_CHECKING:
    from pathlib import Path

STRANGER, ANOTHER = "127.0.0.2", "127.0.0.3"
PROMPT = pb.GenerateRequest(prompt="a red apple")
GET = {"host": "localhost"}


def free_address() -> str:
    """Returns an address with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def status(address: str, path: str, local: str) -> int:
    """Returns the HTTP status of a path for another host."""
    connection = await Connection.open(address, local=local)
    try:
        await connection.request("GET", path, GET)
        async with asyncio.timeout(PATIENCE):
            return (await connection.answer("GET"))[0].status_code
    finally:
        connection.close()


async def closed(connection: Connection) -> bytes:
    """Returns the bytes that a connection receives until the server closes it."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(PATIENCE):
            while data := await connection.reader.read(4096):
                received += data
    connection.close()
    return received


async def flood(address: str, count: int, sent: bytes) -> list[Connection]:
    """Opens connections of the stranger, of which each sends the same bytes and then nothing."""
    opened = []
    for _ in range(count):
        connection = await Connection.open(address, local=STRANGER)
        opened.append(connection)
        with contextlib.suppress(ConnectionResetError):
            await connection.send(sent)
    return opened


@pytest.mark.parametrize(
    "count", [pytest.param(1000, marks=pytest.mark.slow), 100], ids=lambda count: f"{count}-connections"
)
@pytest.mark.parametrize("sent", [b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET / HT", b""])
@pytest.mark.parametrize("transport", ["grpc-web", "bridge"])
async def test_a_flood_of_one_host_blocks_nobody_else(transport: str, count: int, sent: bytes) -> None:
    """While a stranger fills the port, other hosts generate images, and the probes answer on both of their ports."""
    limits = PORT_LIMITS if count == 1000 else PortLimits(max_connections=40, max_connections_per_peer=20)
    raise_open_file_limit(2 * count)
    address = free_address()
    async with running(FakeEngine(), transport=transport, ports=limits) as service, serve_probes(address, ready):
        opened = await flood(service.address, count, sent)
        opened += await flood(address, count, sent)
        channel = WebChannel(service.address, local=ANOTHER)
        await read_until(channel.stub().Generate(PROMPT), pb.PHASE_SUCCEEDED)
        assert await status(service.address, "/readyz", ANOTHER) == 200
        assert await status(address, "/readyz", ANOTHER) == 200
        assert await status(address, "/healthz", ANOTHER) == 200
        channel.close()
        for each in opened:
            each.close()


async def ready() -> bool:
    """Reports a server that accepts calls."""
    return True


async def test_many_hosts_that_fill_the_port_leave_room_for_another_one() -> None:
    """A full port closes idle connections of the hosts with the most, so that a host without connections gets one."""
    limits = PortLimits(max_connections=12, max_connections_per_peer=4)
    async with running(FakeEngine(), transport="grpc-web", ports=limits) as service:
        opened = []
        for host in (5, 6, 7):
            for _ in range(4):
                opened.append(await Connection.open(service.address, local=f"127.0.0.{host}"))
                await opened[-1].request("GET", "/healthz", GET)
                assert (await opened[-1].answer("GET"))[0].status_code == 200
        assert await status(service.address, "/healthz", ANOTHER) == 200
        await until(lambda: sum(each.reader.at_eof() for each in opened) == 1)
        for each in opened:
            each.close()


async def test_an_idle_connection_gives_way_to_a_new_one_of_its_host() -> None:
    """A host at its limit loses the connection that has been idle for the longest; without idle ones it gets 503."""
    engine = FakeEngine()
    engine.hold()
    limits = PortLimits(max_connections_per_peer=2)
    async with running(engine, transport="grpc-web", ports=limits) as service:
        idle = await Connection.open(service.address, local=STRANGER)
        await idle.request("GET", "/healthz", GET)
        assert (await idle.answer("GET"))[0].status_code == 200
        channel = WebChannel(service.address, local=STRANGER)
        calls = [channel.stub().Generate(PROMPT) for _ in range(2)]
        for call in calls:
            await call.read()
        assert await closed(idle) == b""
        assert (await closed(await Connection.open(service.address, local=STRANGER))).startswith(b"HTTP/1.1 503 ")
        calls[0].cancel()
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(Exception):
                    assert await status(service.address, "/healthz", STRANGER) == 200
                    break
        engine.allow()
        channel.close()


async def test_a_websocket_counts_until_it_closes() -> None:
    """A WebSocket takes a connection of its host, and gives it back."""
    limits = PortLimits(max_connections_per_peer=1)
    async with running(FakeEngine(), transport="websocket", ports=limits) as service:
        websocket = await open_socket(service.address, local_addr=(STRANGER, 0))
        assert (await closed(await Connection.open(service.address, local=STRANGER))).startswith(b"HTTP/1.1 503 ")
        await websocket.send('{"type": "generate", "id": "a", "request": {"prompt": "a red apple"}}')
        assert (await receive(websocket))["type"] == "progress"
        await websocket.close()
        await until(lambda: websocket.state.name == "CLOSED")
        assert await status(service.address, "/healthz", STRANGER) == 200


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"not TLS at all\r\n\r\n"])
async def test_incomplete_tls_handshakes_count_for_their_host(sent: bytes, tmp_path: Path) -> None:
    """A host that never completes its handshakes reaches its own limit, and other hosts connect."""
    authority = Authority(tmp_path)
    limits = PortLimits(max_connections=8, max_connections_per_peer=6)
    async with running(FakeEngine(), transport="grpc-web", ports=limits, authority=authority) as service:
        opened = await flood(service.address, 20, sent)
        channel = WebChannel(service.address, context=authority.context(), local=ANOTHER)
        for _ in range(3):
            await read_until(channel.stub().Generate(PROMPT), pb.PHASE_SUCCEEDED)
        channel.close()
        for each in opened:
            each.close()


UPGRADE = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
KEY = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


@pytest.mark.parametrize(
    ("line", "headers"),
    [
        ("GET /v1/ws HTTP/1.1", KEY + "".join(f"x-{number}: y\r\n" for number in range(130))),
        ("GET /v1/ws HTTP/1.1", KEY + f"x: {'y' * 9000}\r\n"),
        ("POST /v1/ws HTTP/1.1", KEY),
        ("POST /v1/ws HTTP/1.1", f"{KEY}content-length: 5\r\n"),
        ("GET /v1/ws HTTP/1.1", f"{KEY}transfer-encoding: chunked\r\n"),
        ("GET /v1/ws HTTP/1.0", KEY),
        ("GET /v1/ws HTTP/1.1", ""),
        ("GET /v1/ws HTTP/1.1", "sec-websocket-key: short\r\n"),
        ("GET /v1/ws HTTP/1.1", f"{KEY}sec-websocket-extensions: ;;;\r\n"),
        ("GET /v1/\x80ws HTTP/1.1", KEY),
        ("GET /v1/ws?\x80 HTTP/1.1", KEY),
        ("GET /v1/%80ws HTTP/1.1", KEY),
        ("GET http://localhost/v1/ws HTTP/1.1", KEY),
        ("GET * HTTP/1.1", KEY),
        ("GET /v1/ws HTTP/1.1", f"{KEY}x-\x80: y\r\n"),
        ("GET /v1/ws HTTP/1.1", f"{KEY}sec-websocket-protocol: \x80\r\n"),
        ("GET /v1/ws HTTP/1.1", f"{KEY}content-length: x\r\n"),
    ],
)
async def test_an_invalid_websocket_handshake_closes_the_connection(
    line: str, headers: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with a handshake, the client gets an answer, the connection closes, and no error is logged."""
    limits = PortLimits(request_seconds=10 * PATIENCE, max_connections_per_peer=1)
    async with running(FakeEngine(), transport="websocket", ports=limits) as service:
        connection = await Connection.open(service.address, local=STRANGER)
        data = f"{line}\r\nhost: localhost\r\n{UPGRADE}{headers}\r\n".encode("latin-1")
        await connection.send(data)
        if (received := await connection.reader.read(12)) != b"HTTP/1.1 101":
            received += await closed(connection)
            assert received.startswith(b"HTTP/1.1 4")
        connection.close()
        await until_connects(service.address)
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


async def until_connects(address: str) -> None:
    """Waits until the server has noticed that the stranger's only connection is closed."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(Exception):
                if await status(address, "/healthz", STRANGER) == 200:
                    return


def test_the_ports_for_probes_and_metrics_are_small() -> None:
    """Their limits are far below those of the other ports, so their connections cost little memory and few files."""
    assert SIDE_PORT_LIMITS.max_connections < PORT_LIMITS.max_connections / 10
    assert SIDE_PORT_LIMITS.request_seconds < PORT_LIMITS.request_seconds
