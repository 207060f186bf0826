"""Callers without keys are hosts: no client can pass for another one, except a proxy that the operator trusts."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.limits import PortLimits
from calotype_server.transport.net.proxies import TrustedProxies
from support.engine.fake_engine import FakeEngine
from support.grpcweb import WebChannel
from support.service import read_until, running

PROMPT = pb.GenerateRequest(prompt="a red apple")
LOCAL = TrustedProxies(["127.0.0.1"])
OTHER = "192.0.2.7"
SPOOFED = [
    ("x-forwarded-for", OTHER),
    ("forwarded", f"for={OTHER}"),
    ("x-real-ip", OTHER),
    ("x-client-ip", OTHER),
    ("true-client-ip", OTHER),
]


def forwarded(*hosts: str) -> list[tuple[str, str]]:
    """Returns the metadata with which a proxy forwards a call."""
    return [("x-forwarded-for", ", ".join(hosts))]


async def generate(stub: Any, metadata: Any = None) -> str:
    """Generates an image and returns the id of the generation."""
    message = await read_until(stub.Generate(PROMPT, metadata=metadata), pb.PHASE_SUCCEEDED)
    return message.generation_id


async def listed(stub: Any, metadata: Any = None) -> set[str]:
    """Returns the ids of the generations in the caller's list."""
    answer = await stub.ListGenerations(pb.ListGenerationsRequest(), metadata=metadata)
    return {each.generation_id for each in answer.generations}


async def test_no_header_of_a_stranger_names_another_host(transport: str) -> None:
    """Without trusted proxies a caller stays the host that it connects from, so it sees no list of another host."""
    async with running(FakeEngine(), transport=transport) as service:
        mine = await generate(service.stub, SPOOFED)
        assert await listed(service.stub) == {mine}
        assert await listed(service.stub, SPOOFED) == {mine}


async def test_no_header_of_a_stranger_evades_the_call_limit(transport: str) -> None:
    """Calls of one host count together, whatever addresses they name."""
    engine = FakeEngine()
    engine.hold()
    # A WebSocket counts, and so does each generation on it.
    limits = PortLimits(max_calls_per_peer=2)
    async with running(engine, transport=transport, ports=limits, max_queue=9) as service:
        calls = [service.stub.Generate(PROMPT, metadata=forwarded(f"192.0.2.{number}")) for number in range(3)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            for call in calls:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        engine.allow()


async def test_a_trusted_proxy_names_its_client(transport: str) -> None:
    """Callers behind a trusted proxy are distinguished by the address that the proxy has appended."""
    async with running(FakeEngine(), transport=transport, proxies=LOCAL, web={"proxies": LOCAL}) as service:
        mine = await generate(service.stub, forwarded(OTHER))
        assert await listed(service.stub, forwarded("192.0.2.8")) == set()
        # The client may have sent a header of its own.
        assert await listed(service.stub, forwarded("192.0.2.8", OTHER)) == {mine}
        assert await listed(service.stub, forwarded(OTHER, "192.0.2.8")) == set()
        assert await listed(service.stub) == set()


async def test_a_server_knows_the_callers_of_a_trusted_bridge() -> None:
    """A bridge passes on the address of its client, and replaces an address that the client has sent."""
    async with running(FakeEngine(), transport="bridge", proxies=LOCAL) as service:
        hosts = [WebChannel(service.address, local=f"127.0.0.{number}") for number in (2, 3)]
        stub, other = (each.stub() for each in hosts)
        mine = await generate(stub)
        assert await listed(stub) == {mine}
        assert await listed(other, forwarded("127.0.0.2")) == set()
        for each in hosts:
            each.close()


async def test_a_trusted_proxy_names_the_scheme() -> None:
    """Over a proxy with TLS, responses require TLS from then on; no other client can cause that."""
    for trusted, expected in ((LOCAL, True), (TrustedProxies(), False)):
        async with running(FakeEngine(), transport="sse", proxies=trusted) as service:
            secure = {"host": "pictures.localhost", "x-forwarded-proto": "https"}
            answer = await service.stub.client.get(f"http://{service.address}/healthz", headers=secure)
            assert ("strict-transport-security" in answer.headers) is expected
