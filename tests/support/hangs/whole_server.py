"""The whole server in the process of the test, with a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.apps import server as app
from calotype_server.settings import Settings
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.web.server import WebServer
from support.engine.fake_engine import MODEL, FakeEngine
from support.grpcweb import Connection, WebChannel
from support.metrics import Scrape

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

SERVICE = "calotype.v1.GenerationService"
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
        self.limits: asyncio.Queue[tuple[float, int]] = asyncio.Queue()
        """Limits that the server set for its stop: seconds and exit code."""
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
        defaults = {"grpc_address": "127.0.0.1:0", "web_address": "127.0.0.1:0", "cache_dir": self.cache_dir}
        given = Settings(**{**defaults, **settings})
        self.serving = asyncio.create_task(
            app.serve(given, lambda _: announced.set(), self._load, lambda *limit: self.limits.put_nowait(limit))
        )
        self.ready = announced.wait
        self.web_address = await self._addresses["WebServer"]
        web = WebChannel(self.web_address)
        # With a handover time, the port opens later.
        address = given.grpc_address if given.handover_seconds else await self._addresses["NativeServer"]
        async with grpc.aio.insecure_channel(address) as native:
            self.native_address = address
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

    async def health(self, *, native: bool = True) -> set[int]:
        """Returns the health statuses on both ports, or on the web port, of the service and of the whole server."""
        answers = [
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            for channel in self.channels[0 if native else 1 :]
            for service in (SERVICE, "")
        ]
        return {answer.status for answer in answers}

    async def refuses_connections(self) -> bool:
        """Returns whether a client that connects to the gRPC port now fails."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(self.native_address, options) as channel:
            try:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            except grpc.aio.AioRpcError as error:
                return "Connection refused" in (error.details() or "")
        return False

    async def get(self, path: str) -> tuple[int, str]:
        """Returns the HTTP status and body of a path on the web port."""
        connection = await Connection.open(self.web_address)
        try:
            await connection.request("GET", path, {"host": self.web_address})
            head, body = await connection.answer("GET")
        finally:
            connection.close()
        return head.status_code, body.decode()

    async def probes(self, *, native: bool = True) -> tuple[set[int], int, int, float]:
        """Returns the results of all probes: gRPC health, `/healthz`, `/readyz` and the metric."""
        serving = await self.metric("calotype_serving")
        return (
            await self.health(native=native),
            (await self.get("/healthz"))[0],
            (await self.get("/readyz"))[0],
            serving,
        )

    async def metric(self, name: str) -> float:
        """Returns the value of a metric without labels."""
        return Scrape((await self.get("/metrics"))[1]).value(name)

    async def watch(self) -> Any:
        """Watches the health of the service on the native port, and returns the call."""
        stub = health_pb2_grpc.HealthStub(self.channels[0])
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        return watch
