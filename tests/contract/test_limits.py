"""Limits on each client of the native and the web port, over real sockets and with clients that exceed them."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Access, Caller
from calotype_server.limits import PortLimits
from calotype_server.transport.net.call_limits import CallLimiter
from calotype_server.transport.net.open_files import raise_open_file_limit
from calotype_server.transport.web.server import WebServer
from support.authority import Authority
from support.engine.fake_engine import FakeEngine
from support.grpcweb import Connection, WebChannel, frame, header_dict
from support.lab import PATIENCE, until
from support.service import Service, read_until, running

if TYPE_CHECKING:
    from pathlib import Path

PORTS = ("native", "grpc-web")
PROMPT = pb.GenerateRequest(prompt="a red apple")
METHOD = "/calotype.v1.GenerationService/Generate"


@pytest.fixture(params=PORTS)
def port(request: pytest.FixtureRequest) -> str:
    """The port under test."""
    return request.param


async def rejected(call) -> grpc.aio.AioRpcError:
    """Returns the status of a call that ends without a message."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(PATIENCE):
            await call.read()
    return caught.value


async def works(service: Service) -> None:
    """Fails unless the service generates an image."""
    await read_until(service.stub.Generate(PROMPT), pb.PHASE_SUCCEEDED)


def details(error: grpc.aio.AioRpcError) -> Any:
    """Returns the serialized details of a status."""
    return next(value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin")


async def closed(connection: Connection) -> bytes:
    """Returns the bytes that a connection receives until the server closes it."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(PATIENCE):
            while data := await connection.reader.read(4096):
                received += data
    connection.close()
    return received


async def test_connections_above_the_limit_are_closed(port: str) -> None:
    """Each excess connection is closed at once, on the web port with 503. After others close, new ones are accepted."""
    async with running(FakeEngine(), transport=port, ports=PortLimits(max_connections=20)) as service:
        if port == "native":
            await works(service)
        flood = [await Connection.open(service.address) for _ in range(60)]
        excess = flood[20 - (port == "native") :]
        ends = await asyncio.gather(*map(closed, excess))
        if port == "grpc-web":
            # If the kernel resets the connection early enough, the response is lost.
            assert any(end.startswith(b"HTTP/1.1 503 ") and b"retry-after" in end for end in ends)
            assert all(end == b"" or end.startswith(b"HTTP/1.1 503 ") for end in ends)
        staying = [each for each in flood if each not in excess]
        assert not any(each.reader.at_eof() for each in staying)
        for each in staying:
            each.close()
        async with asyncio.timeout(PATIENCE):
            while True:
                # The server notices the closed connections with a delay.
                with contextlib.suppress(AssertionError, OSError, grpc.aio.AioRpcError):
                    await works(service)
                    break


async def test_calls_of_one_host_are_limited(port: str) -> None:
    """An excess call is rejected at once with a reason and a retry delay. After one call ends, the next is accepted."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport=port, ports=PortLimits(max_calls_per_peer=3), max_queue=9) as service:
        calls = [service.stub.Generate(PROMPT) for _ in range(3)]
        for call in calls:
            await call.read()
        for _ in range(5):
            error = await rejected(service.stub.Generate(PROMPT))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert b"TOO_MANY_CALLS" in details(error)
            assert b"google.rpc.RetryInfo" in details(error)
        assert len(engine.jobs) == 1
        calls.pop().cancel()
        async with asyncio.timeout(PATIENCE):
            while True:
                call = service.stub.Generate(PROMPT)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call.read()
                    break
        engine.allow()


async def test_every_call_of_a_burst_is_answered() -> None:
    """Excess calls are answered at once; HTTP/2 alone would silently queue those above its stream limit.

    HTTP/2 itself answers a few with UNAVAILABLE, if the client starts them before it sees that others have ended.
    """
    engine = FakeEngine()
    engine.hold()
    async with running(engine, ports=PortLimits(max_calls_per_peer=4), max_queue=9) as service:
        calls = [service.stub.Generate(PROMPT) for _ in range(100)]
        async with asyncio.timeout(PATIENCE):
            answers = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
        rejections = Counter(each.code().name for each in answers if isinstance(each, grpc.aio.AioRpcError))
        assert rejections.total() == 96
        assert set(rejections) <= {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
        assert rejections["RESOURCE_EXHAUSTED"]
        engine.allow()


async def test_ports_share_the_call_limit() -> None:
    """The limit of a host is for all ports together, not for each."""
    engine = FakeEngine()
    engine.hold()
    call_limiter = CallLimiter(1)
    async with running(engine, call_limiter=call_limiter) as service:
        web = WebServer(
            "127.0.0.1:0",
            service.services.add_to,
            Access(),
            is_ready=service.services.is_serving,
            call_limiter=call_limiter,
        )
        channel = WebChannel(await web.start())
        await service.stub.Generate(PROMPT).read()
        error = await rejected(channel.stub().Generate(PROMPT))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        channel.close()
        await web.stop(0)
        engine.allow()


async def test_a_request_that_does_not_arrive_times_out(port: str) -> None:
    """A call whose request message does not arrive ends with an error, and no generation starts."""
    engine = FakeEngine()
    async with running(engine, transport=port, ports=PortLimits(request_seconds=0.2)) as service:
        if port == "native":

            async def never():
                await asyncio.get_running_loop().create_future()
                yield b""

            error = await rejected(service.channel.stream_stream(METHOD)(never()))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert b"REQUEST_TOO_LATE" in details(error)
        else:
            connection = await Connection.open(service.address)
            kind = {"host": service.address, "content-type": "application/grpc-web+proto", "content-length": "50"}
            await connection.request("POST", METHOD, kind)
            await connection.send(frame(b"")[:3])
            assert b"grpc-status: 4\r\n" in (await connection.answer())[1]
            # The rest of the request has a timeout, too.
            await connection.send(b"x")
            assert await closed(connection) == b""
        assert engine.jobs == []
        await works(service)


async def test_the_head_timeout_applies_to_later_requests() -> None:
    """On a reused connection, an incomplete request head times out, too."""
    async with running(FakeEngine(), transport="grpc-web", ports=PortLimits(request_seconds=0.2)) as service:
        connection = await Connection.open(service.address)
        await connection.request("GET", "/healthz", {"host": service.address})
        assert (await connection.answer("GET"))[0].status_code == 200
        await connection.send(b"GET / HT")
        assert await closed(connection) == b""


@pytest.mark.parametrize("tls", [False, True])
async def test_a_silent_connection_is_closed(port: str, tls: bool, tmp_path: Path) -> None:
    """A connection without a request is closed after the timeout, with and without TLS."""
    authority = Authority(tmp_path) if tls else None
    limits = PortLimits(request_seconds=0.5)
    async with running(FakeEngine(), transport=port, ports=limits, authority=authority) as service:
        await closed(await Connection.open(service.address))
        await works(service)


async def test_a_large_request_is_rejected(port: str) -> None:
    """One byte above the limit is rejected; a request of exactly the limit is read and validated."""
    async with running(FakeEngine(), transport=port, ports=PortLimits(max_request_bytes=2000)) as service:
        for size, code in (
            (2000, grpc.StatusCode.INVALID_ARGUMENT),
            (2001, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (3_000_000, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            prompt = "x" * size
            while (request := pb.GenerateRequest(prompt=prompt)).ByteSize() > size:
                prompt = prompt[1:]
            assert (await rejected(service.stub.Generate(request))).code() is code
        await works(service)


EXCESSIVE: dict[str, list[tuple[str, str | bytes]]] = {
    "huge": [("large", "x" * 40_000)],
    "many": [(f"large-{number}", "x") for number in range(2000)],
    "same": [("large", "x" * 20)] * 2000,
    "binary": [("large-bin", bytes(40_000))],
}


@pytest.mark.parametrize("kind", EXCESSIVE)
async def test_excessive_metadata_is_rejected(port: str, kind: str) -> None:
    """The total size counts, for any number and size of entries. The next call succeeds."""
    engine = FakeEngine()
    async with running(engine, transport=port) as service:
        if port == "native":
            error = await rejected(service.stub.Generate(PROMPT, metadata=EXCESSIVE[kind]))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        else:
            connection = await Connection.open(service.address)
            lines = [f"{key}: {value if isinstance(value, str) else 'A' * 55_000}" for key, value in EXCESSIVE[kind]]
            head = [f"POST {METHOD} HTTP/1.1", f"host: {service.address}", "content-length: 0", *lines, "", ""]
            with contextlib.suppress(ConnectionResetError):
                await connection.send("\r\n".join(head).encode())
            received = await closed(connection)
            assert received == b"" or received.startswith(b"HTTP/1.1 400 ")
        assert engine.jobs == []
        await works(service)


async def test_metadata_within_the_limit_passes(port: str) -> None:
    """Metadata of 12 kB, such as a large token, is accepted."""
    async with running(FakeEngine(), transport=port) as service:
        call = service.stub.Generate(PROMPT, metadata=[("authorization", "x" * 12_000)])
        await read_until(call, pb.PHASE_SUCCEEDED)


async def test_a_stalled_reader_does_not_delay_its_generation(port: str) -> None:
    """The generation completes at its own speed. The web port, which has no keepalive pings, drops the reader."""
    engine = FakeEngine()
    engine.preview_size = (1024, 1024)
    limits = PortLimits(stall_seconds=1)
    async with running(engine, transport=port, ports=limits) as service:
        if port == "native":
            stalled = service.stub.Generate(pb.GenerateRequest(prompt="a", step_count=50))
            first = await stalled.read()
            generation = service.generations.find(first.generation_id, Caller(""))
            await until(lambda: generation.ended)
            # The reader still receives the end when it reads again.
            assert (await read_until(stalled, pb.PHASE_SUCCEEDED)).image
        else:
            connection = await Connection.open(service.address)
            kind = {"host": service.address, "content-type": "application/grpc-web+proto"}
            request = pb.GenerateRequest(prompt="a", step_count=50)
            request.output.format = pb.IMAGE_FORMAT_PNG
            await connection.request("POST", METHOD, kind, frame(request.SerializeToString()))
            transport: Any = connection.writer.transport
            transport.pause_reading()
            await until(lambda: engine.jobs and not engine.active)
            connection.close()
        await works(service)


async def test_foreign_hosts_and_origins_are_rejected() -> None:
    """No call starts with a foreign, duplicate or missing Host, or with a foreign or duplicate Origin."""
    engine = FakeEngine()
    async with running(engine, transport="grpc-web") as service:
        ours = f"host: {service.address}"
        for heads, statuses in (
            (["host: evil.example"], {421}),
            ([ours, "origin: https://evil.example"], {403}),
            ([ours, "origin: null"], {403}),
            ([ours, f"origin: http://{service.address}.evil.example"], {403}),
            ([ours, "host: evil.example"], {400, 421}),
            (["host: evil.example", ours], {400, 421}),
            ([ours, "origin: https://evil.example", f"origin: http://{service.address}"], {400, 403}),
            ([ours, f"origin: http://{service.address}", "origin: https://evil.example"], {400, 403}),
            ([f"x-forwarded-host: {service.address}", "host: evil.example"], {421}),
            ([], {400, 421}),
        ):
            connection = await Connection.open(service.address)
            body = frame(PROMPT.SerializeToString())
            kind = ["content-type: application/grpc-web+proto", f"content-length: {len(body)}"]
            lines = [f"POST {METHOD} HTTP/1.1", *heads, *kind, "", ""]
            await connection.send("\r\n".join(lines).encode() + body)
            head, _ = await connection.answer()
            assert head.status_code in statuses, heads
            assert "access-control-allow-origin" not in header_dict(head)
            connection.close()
        # An absolute request target does not replace the check of the Host header.
        connection = await Connection.open(service.address)
        await connection.send(b"GET http://localhost/ HTTP/1.1\r\nhost: evil.example\r\n\r\n")
        assert (await connection.answer("GET"))[0].status_code == 421
        connection.close()
        assert engine.jobs == []
        await works(service)


def test_the_open_file_limit_is_raised_as_far_as_possible(capsys: pytest.CaptureFixture[str]) -> None:
    """The soft limit is raised if it is too low, but not above the hard limit, and it is never lowered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        raise_open_file_limit(0)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 500), hard))
        raise_open_file_limit(600)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(728, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""The start of an HTTP/2 connection, with empty settings."""


@pytest.mark.parametrize("sent", [b"", PREFACE[:10], PREFACE], ids=["nothing", "part of the preface", "preface"])
async def test_a_native_connection_that_does_not_answer_is_closed(sent: bytes) -> None:
    """Each phase of an HTTP/2 connection without calls has a timeout: preface, settings, and the answers to pings."""
    limits = PortLimits(request_seconds=0.5, keepalive_seconds=1, keepalive_timeout_seconds=0.5, idle_seconds=600)
    async with running(FakeEngine(), ports=limits) as service:
        connection = await Connection.open(service.address)
        await connection.send(sent)
        await closed(connection)
        await works(service)
