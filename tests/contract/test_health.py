"""Health on both ports from start to exit: the whole server in this process, with a fake engine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calotype import AsyncClient, CalotypeError
from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import EngineDead
from support.grpcweb import Connection
from support.hangs.whole_server import NOT_SERVING, PATIENCE, SERVICE, SERVING, Server
from support.metrics import Scrape
from support.process import free_address
from support.service import read_until

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = pb.GenerateRequest(prompt="a red apple")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """A server in this process."""
    return Server(monkeypatch, tmp_path)


async def test_probes_while_loading_serving_and_draining(server: Server) -> None:
    """The server is always alive, and ready only from the end of loading until SIGTERM."""
    async with server.running():
        assert await server.probes() == ({NOT_SERVING}, 200, 503, 0)
        server.loaded.set()
        await asyncio.wait_for(server.ready(), PATIENCE)
        assert await server.probes() == ({SERVING}, 200, 200, 1)
        server.engine.hold()
        running = server.stub.Generate(PROMPT)
        await running.read()
        watch = health_pb2_grpc.HealthStub(server.channels[0]).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await watch.read()).status == NOT_SERVING
        assert await server.probes(native=False) == ({NOT_SERVING}, 200, 503, 0)
        assert await server.refuses_connections()
        server.engine.allow()
        await read_until(running, pb.PHASE_SUCCEEDED)
        assert await asyncio.wait_for(server.serving, PATIENCE) == 0


async def test_with_a_handover_time_the_grpc_port_accepts_connections_only_while_ready(server: Server) -> None:
    """Clients that connect to a loading or stopping server are refused, while those with a connection can still call.

    A second signal ends the handover.
    """
    async with server.running(grpc_address=free_address(), handover_seconds=3600):
        assert await server.refuses_connections()
        server.loaded.set()
        await asyncio.wait_for(server.ready(), PATIENCE)
        assert not await server.refuses_connections()
        watch = health_pb2_grpc.HealthStub(server.channels[0]).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await watch.read()).status == NOT_SERVING
        while not await server.refuses_connections():
            pass
        await read_until(server.stub.Generate(PROMPT), pb.PHASE_SUCCEEDED)
        assert await server.probes() == ({NOT_SERVING}, 200, 503, 0)
        watch.cancel()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(server.serving, PATIENCE) == 0


async def test_a_client_waits_until_the_model_is_loaded(server: Server) -> None:
    """The first call of a client waits for a loading server, which asks for at least a second, and then succeeds."""
    waits, waiting = [], asyncio.Event()

    def note(error: CalotypeError, delay: float) -> None:
        waits.append((error.reason, error.retry_after, delay))
        waiting.set()

    async with server.running(), AsyncClient(server.native_address, on_reconnect=note) as client:
        call = asyncio.create_task(client.generate("a red apple").result())
        await asyncio.wait_for(waiting.wait(), PATIENCE)
        server.loaded.set()
        assert (await asyncio.wait_for(call, PATIENCE)).format == "png"
    assert {reason for reason, _, _ in waits} == {"NOT_READY"}
    assert all(1 <= asked <= min(delay, 30) for _, asked, delay in waits)


async def test_a_dead_device_ends_the_server(server: Server) -> None:
    """Health becomes NOT_SERVING when the first generation fails, before the others have ended; the exit code is 1."""
    async with server.running():
        server.loaded.set()
        await asyncio.wait_for(server.ready(), PATIENCE)
        server.engine.hold()
        watch = health_pb2_grpc.HealthStub(server.channels[0]).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        calls = [server.stub.Generate(PROMPT) for _ in range(2)]
        for call in calls:
            await call.read()
        server.engine.failure = EngineDead("The device failed.")
        server.engine.allow(1)
        assert (await watch.read()).status == NOT_SERVING
        assert await server.probes(native=False) == ({NOT_SERVING}, 200, 503, 0)
        server.engine.allow()
        for call in calls:
            assert (await read_until(call, pb.PHASE_FAILED)).error.reason == "ENGINE_DEAD"
        assert await asyncio.wait_for(server.serving, PATIENCE) == 1


async def test_probes_have_their_own_address(server: Server) -> None:
    """It serves only probes, from the start, under any host name, and while one host fills the web port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    async with server.running(probe_address=address, max_connections=4, max_connections_per_peer=4):
        held = [await Connection.open(server.web_address) for _ in range(4)]
        server.web_address = address
        assert [(await server.get(path))[0] for path in ("/healthz", "/readyz")] == [200, 503]
        server.loaded.set()
        await asyncio.wait_for(server.ready(), PATIENCE)
        assert [(await server.get(path))[0] for path in ("/healthz", "/readyz")] == [200, 200]
        assert [(await server.get(path))[0] for path in ("/", "/metrics", "/v1/model")] == [404, 404, 404]
        connection = await Connection.open(address)
        await connection.send(b"HEAD /readyz HTTP/1.1\r\nhost: some-container\r\n\r\n")
        assert (await connection.answer("HEAD"))[0].status_code == 200
        for each in (connection, *held):
            each.close()


async def test_metrics_can_have_their_own_address(server: Server) -> None:
    """With a metrics address, the web port does not serve `/metrics`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    async with server.running(metrics_address=address):
        assert (await server.get("/metrics"))[0] == 404
        server.web_address = address
        status, body = await server.get("/metrics")
        assert (status, Scrape(body).value("calotype_serving")) == (200, 0)
        assert (await server.get("/healthz"))[0] == 404
