"""Strangers cause no traceback in the log, and a bounded number of lines."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING

import pytest

from calotype_server.limits import PortLimits
from calotype_server.observability.logs import configure_logging
from support import fuzz
from support.authority import Authority
from support.engine.fake_engine import FakeEngine
from support.grpcweb import Connection
from support.service import running

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

COUNT = 80
LIMITS = PortLimits(request_seconds=0.5, max_connections_per_peer=2 * COUNT)


async def exchange(address: str, parts: list[bytes], context: ssl.SSLContext | None = None) -> None:
    """Sends bytes, waits for an answer after each part, and drops the connection."""
    with contextlib.suppress(OSError, TimeoutError):
        connection = await Connection.open(address, context)
        try:
            for part in parts:
                await connection.send(part)
                async with asyncio.timeout(0.1):
                    await connection.reader.read(3000)
        finally:
            connection.close()


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
@pytest.mark.parametrize("transport", ["native", "bridge", "websocket"])
async def test_random_bytes_leave_no_traceback(
    transport: str, tls: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged HTTP, HTTP/2, WebSocket handshakes and messages cause no traceback and no error."""
    chance = random.Random(16)
    authority = Authority(tmp_path) if tls else None
    make = fuzz.http2 if transport == "native" else lambda chance: chance.choice((fuzz.http, fuzz.websocket))(chance)
    async with running(FakeEngine(), transport=transport, authority=authority, ports=LIMITS) as service:
        configure_logging("info", "json")
        contexts = [None, authority.context() if authority else None]
        exchanges = []
        for _ in range(COUNT):
            sent = make(chance)
            parts = sent if isinstance(sent, list) else [sent]
            exchanges.append(exchange(service.address, parts, chance.choice(contexts)))
        await asyncio.gather(*exchanges)
    logged = capsys.readouterr().err
    assert "Traceback" not in logged
    assert '"level": "error"' not in logged
    assert "exc_info" not in logged


@pytest.mark.parametrize(
    "frames",
    [b"\x81\x82\0\0\0\0\xff\xfe", b"\x81\x82\0\0\0\0\xff\xfe\x88\x80\0\0\0\0", b"\x81\x81\0\0\0\0{\xff\x80\0\0\0\0"],
)
async def test_faulty_websocket_messages_leave_no_error(frames: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """Text that is not UTF-8, also before a close, and a violation after a command only end the connection."""
    upgrade = fuzz.websocket_upgrade()
    async with running(FakeEngine(), transport="websocket", ports=LIMITS) as service:
        configure_logging("info", "json")
        connection = await Connection.open(service.address)
        await connection.send(upgrade)
        assert (await connection.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        await connection.send(frames)
        async with asyncio.timeout(20):
            await connection.reader.read()
        connection.close()
    logged = capsys.readouterr().err
    assert '"level": "error"' not in logged


async def test_repeated_bad_requests_leave_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger who repeats a request that uvicorn warns about adds ten lines a minute, not one for each."""
    async with running(FakeEngine(), transport="websocket", ports=LIMITS) as service:
        configure_logging("info", "json")
        bad = (
            [b"nonsense\r\n\r\n"],
            [b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"],
        )
        await asyncio.gather(*(exchange(service.address, parts) for parts in bad for _ in range(COUNT)))
    logged = capsys.readouterr().err.splitlines()
    assert sum("Invalid HTTP request received." in line for line in logged) == 10
    assert sum("Unsupported upgrade request." in line for line in logged) == 10
