"""Health on both ports from start to exit: the whole server in this process, with a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calotype import AsyncClient, CalotypeError
from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.apps import server as app
from calotype_server.errors import EngineDead
from calotype_server.settings import Settings
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.web.server import WebServer
from support.engine.fake_engine import MODEL, FakeEngine
from support.grpcweb import Connection, WebChannel
from support.metrics import Scrape
from support.service import read_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SERVICE = "calotype.v1.GenerationService"
PROMPT = pb.GenerateRequest(prompt="a red apple")
PATIENCE = 20
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Engine(FakeEngine):
    """An engine with two slots."""

    model = replace(MODEL, max_active=2)


class Server:
    """Runs `app.serve` in a task, with an engine that finishes loading when the test sets `loaded`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
        self.cache_dir = cache_dir
        self.engine = Engine()
        self.loaded = threading.Event()
        self._addresses: dict[str, asyncio.Future[str]] = {}
        for kind in (NativeServer, WebServer):
            monkeypatch.setattr(kind, "start", self._record_address(kind))

    async def _load(self, *_: object) -> FakeEngine:
        assert await asyncio.to_thread(self.loaded.wait, PATIENCE)
        return self.engine

    def _record_address(self, kind: type[NativeServer | WebServer]):
        original, addresses = kind.start, self._addresses

        async def start(server, *arguments: str) -> str:
            address = await original(server, *arguments)
            addresses[kind.__name__].set_result(address)
            return address

        return start

    @contextlib.asynccontextmanager
    async def running(self, **settings: Any) -> AsyncIterator[None]:
        """Runs the server for the duration of the block."""
        self._addresses.update(
            NativeServer=asyncio.get_running_loop().create_future(),
            WebServer=asyncio.get_running_loop().create_future(),
        )
        announced = asyncio.Event()
        settings |= {"grpc_address": "127.0.0.1:0", "web_address": "127.0.0.1:0", "cache_dir": self.cache_dir}
        given = Settings(**settings)
        self.serving = asyncio.create_task(app.serve(given, lambda _: announced.set(), self._load))
        self.ready = announced.wait
        self.web_address = await self._addresses["WebServer"]
        self.address = await self._addresses["NativeServer"]
        web = WebChannel(self.web_address)
        async with grpc.aio.insecure_channel(self.address) as native:
            self.channels = native, web
            self.stub = GenerationServiceStub(native)
            try:
                yield
            finally:
                self.loaded.set()
                self.engine.close()
                if not self.serving.done():
                    os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(self.serving, PATIENCE)
                web.close()

    async def health(self) -> set[int]:
        """Returns the health statuses on both ports, of the service and of the whole server."""
        answers = [
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            for channel in self.channels
            for service in (SERVICE, "")
        ]
        return {answer.status for answer in answers}

    async def get(self, path: str) -> tuple[int, str]:
        """Returns the HTTP status and body of a path on the web port."""
        connection = await Connection.open(self.web_address)
        try:
            await connection.request("GET", path, {"host": self.web_address})
            head, body = await connection.answer("GET")
        finally:
            connection.close()
        return head.status_code, body.decode()

    async def probes(self) -> tuple[set[int], int, int, float]:
        """Returns the results of all probes: gRPC health, `/healthz`, `/readyz` and the metric."""
        serving = Scrape((await self.get("/metrics"))[1]).value("calotype_serving")
        return await self.health(), (await self.get("/healthz"))[0], (await self.get("/readyz"))[0], serving


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
        assert await server.probes() == ({NOT_SERVING}, 200, 503, 0)
        server.engine.allow()
        await read_until(running, pb.PHASE_SUCCEEDED)
        assert await asyncio.wait_for(server.serving, PATIENCE) == 0


async def test_a_client_waits_until_the_model_is_loaded(server: Server) -> None:
    """The first call of a client waits for a loading server, which asks for at least a second, and then succeeds."""
    waits, waiting = [], asyncio.Event()

    def note(error: CalotypeError, delay: float) -> None:
        waits.append((error.reason, error.retry_after, delay))
        waiting.set()

    async with server.running(), AsyncClient(server.address, on_reconnect=note) as client:
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
        assert await server.probes() == ({NOT_SERVING}, 200, 503, 0)
        server.engine.allow()
        for call in calls:
            assert (await read_until(call, pb.PHASE_FAILED)).error.reason == "ENGINE_DEAD"
        assert await asyncio.wait_for(server.serving, PATIENCE) == 1


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
