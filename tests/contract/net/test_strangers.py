"""Strangers on the ports: they are rejected before their request arrives, and cannot hide a key in a trailer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.limits import PortLimits
from calotype_server.observability.events import CallEnded, CallRefused
from support.engine.fake_engine import FakeEngine
from support.grpcweb import Connection, frame, header_dict
from support.keyring import Keyring
from support.lab import PATIENCE
from support.service import read_until, running

if TYPE_CHECKING:
    from pathlib import Path

METHOD = "/calotype.v1.GenerationService/Generate"
PROMPT = pb.GenerateRequest(prompt="a red apple")
SLOW = PortLimits(request_seconds=10 * PATIENCE, max_calls_per_peer=2)
"""Waits for a request for longer than a test may take."""

KIND = {"content-type": "application/grpc-web+proto"}


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    """One user."""
    keyring = Keyring(tmp_path / "keys.toml")
    keyring.add("alice")
    return keyring


async def silent_call(service: Any, transport: str, path: str) -> Any:
    """Makes a call without a key, whose request never arrives. Returns what ends it, for the second function."""
    if transport == "native":

        async def never():
            await asyncio.get_running_loop().create_future()
            yield b""

        return service.channel.stream_stream(path)(never())
    connection = await Connection.open(service.address)
    await connection.request("POST", path, {"host": service.address, **KIND, "content-length": "50"})
    await connection.send(frame(b"")[:3])
    return connection


async def code_of(call: Any) -> int:
    """Returns the status with which a call ends."""
    async with asyncio.timeout(PATIENCE):
        if not isinstance(call, Connection):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            return caught.value.code().value[0]
        head, body = await call.answer()
        call.close()
        assert header_dict(head)["content-type"] == "application/grpc-web+proto"
        return int(body.partition(b"grpc-status: ")[2].partition(b"\r\n")[0])


@pytest.mark.parametrize("path", [METHOD, "/calotype.v1.GenerationService/GetModel", "/no.such.Service/Method"])
@pytest.mark.parametrize("transport", ["native", "grpc-web"])
async def test_a_call_without_a_key_ends_before_its_request_arrives(
    transport: str, path: str, keyring: Keyring
) -> None:
    """The server answers UNAUTHENTICATED at once, counts the rejection, and keeps its call slots for others."""
    observed: list[Any] = []
    service_options: dict[str, Any] = {"access": keyring.access(), "ports": SLOW, "observe": observed.append}
    async with running(FakeEngine(), transport=transport, **service_options) as service:
        calls = [await silent_call(service, transport, path) for _ in range(4)]
        assert {await code_of(call) for call in calls} == {grpc.StatusCode.UNAUTHENTICATED.value[0]}
        await read_until(service.stub.Generate(PROMPT, metadata=keyring.metadata("alice")), pb.PHASE_SUCCEEDED)
    assert [each.reason for each in observed if isinstance(each, CallRefused)] == ["KEY_REQUIRED"] * 4
    rejected = [each for each in observed if isinstance(each, CallEnded) and each.code == "UNAUTHENTICATED"]
    assert len(rejected) == 4


@pytest.mark.parametrize(
    ("path", "kind"), [(METHOD, KIND), ("/v1/generate", {"content-type": "application/json"})], ids=["grpc-web", "http"]
)
async def test_a_key_in_a_trailer_is_ignored(path: str, kind: dict[str, str], keyring: Keyring) -> None:
    """Trailers of a chunked request are not headers: neither a key nor an address in them counts."""
    engine = FakeEngine()
    key = dict(keyring.metadata("alice"))["authorization"]
    trailers = f"authorization: {key}\r\nx-forwarded-for: 192.0.2.7\r\nx-request-id: late\r\n"
    body = frame(PROMPT.SerializeToString()) if kind is KIND else b'{"prompt": "a red apple"}'
    chunked = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers.encode())
    async with running(engine, transport="sse", access=keyring.access()) as service:
        for part in (1, len(chunked)):
            # The head and the trailers arrive separately, or all together.
            connection = await Connection.open(service.address)
            head = {"host": service.address, **kind, "transfer-encoding": "chunked"}
            lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
            data = "\r\n".join(lines).encode() + chunked
            await connection.send(data[:part])
            await connection.send(data[part:])
            async with asyncio.timeout(PATIENCE):
                answer, content = await connection.answer()
            connection.close()
            assert answer.status_code == 401 or b"grpc-status: 16" in content
            assert header_dict(answer).get("x-request-id") != "late"
    assert engine.jobs == []


async def test_trailers_do_not_reach_the_next_request(keyring: Keyring) -> None:
    """A key in a trailer does not count for the next request on the same connection either; a header there does."""
    async with running(FakeEngine(), transport="sse", access=keyring.access()) as service:
        connection = await Connection.open(service.address)
        key = dict(keyring.metadata("alice"))["authorization"]
        host = f"host: {service.address}\r\n"
        chunked = (
            f"POST /v1/generate HTTP/1.1\r\n{host}transfer-encoding: chunked\r\n\r\n0\r\nauthorization: {key}\r\n\r\n"
        )
        await connection.send(chunked.encode())
        assert (await connection.answer())[0].status_code == 401
        for header, status in (("", 401), (f"authorization: {key}\r\n", 200)):
            connection.next_answer()
            await connection.send(f"GET /v1/model HTTP/1.1\r\n{host}{header}\r\n".encode())
            head = await connection.event()
            assert head.status_code == status
            while type(await connection.event()).__name__ == "Data":
                pass
        connection.close()


@pytest.mark.parametrize("transport", ["grpc-web", "bridge"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_probes_need_no_known_host_name(transport: str, method: str) -> None:
    """Load balancers probe by container name or without any Host header; nothing else accepts that."""
    async with running(FakeEngine(), transport=transport) as service:
        for host in ("", "host: calotype-7f9c\r\n", "host: evil.example\r\n", "host: \r\n", "host: [::1\r\n"):
            for path, status in (("/healthz", 200), ("/readyz", 200), ("/", 421), ("/readyz/", 421)):
                connection = await Connection.open(service.address)
                await connection.send(f"{method} {path} HTTP/1.1\r\n{host}\r\n".encode())
                found, _ = await connection.answer(method)
                connection.close()
                assert found.status_code == status, (path, host)


async def test_only_reading_probes_are_exempt_from_the_host_check() -> None:
    """Other methods, and pages of other origins, are still rejected on the paths of the probes."""
    async with running(FakeEngine(), transport="grpc-web") as service:
        for method, headers, status in (
            ("POST", "host: evil.example\r\ncontent-length: 0\r\n", 421),
            ("GET", "host: evil.example\r\norigin: https://other.example\r\n", 403),
            ("GET", "host: evil.example\r\nhost: localhost\r\n", 400),
        ):
            connection = await Connection.open(service.address)
            await connection.send(f"{method} /readyz HTTP/1.1\r\n{headers}\r\n".encode())
            assert (await connection.answer(method))[0].status_code == status
            connection.close()
