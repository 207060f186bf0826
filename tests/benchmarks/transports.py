"""Measures the cost of one generation over each transport: bytes in both directions, and the server's processor time.

A fake engine waits between steps, so that every reader keeps up and gets the same number of previews, which is
reported. Everything else is the product: event log, JPEG and PNG, encoding, transport. Run as a process, the module is
the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import numpy as np
import psutil

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.auth.access import Access
from calotype_server.observability.logs import configure_logging
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.types import Pixels, PreviewReady
from support.engine.fake_engine import FakeEngine
from support.grpcweb import WebChannel
from support.http import EventStub, SocketStub
from support.proxy import Link
from support.service import running

if TYPE_CHECKING:
    from calotype_server.engine.protocol import Stop
    from calotype_server.types import Event, Job

TRANSPORTS = ("native", "grpc_web", "sse", "websocket")
GENERATIONS = 10
"""Generations of each transport per round, one after another."""
STEPS = 20
STEP_SECONDS = 0.02
EDGE = 128


class PacedEngine(FakeEngine):
    """Shows the same image at every step: a smooth one with some noise, which is realistic for JPEG."""

    def __init__(self) -> None:
        super().__init__()
        ramp = np.linspace(0, 255, EDGE)
        picture = ramp[:, None, None] * [1, 0.5, 0] + ramp[None, :, None] * [0, 0.5, 1]
        noise = np.random.default_rng(0).normal(0, 4, picture.shape)
        self._picture = Pixels(EDGE, EDGE, (picture + noise).clip(0, 255).astype(np.uint8).tobytes())

    def run(self, job: Job, report: Any, stop: Stop) -> Pixels:
        """See `engine.protocol`."""

        def drawn(event: Event) -> None:
            if isinstance(event, PreviewReady):
                time.sleep(STEP_SECONDS)
                event = replace(event, pixels=self._picture)
            report(event)

        super().run(job, drawn, stop)
        return self._picture


def measure(rounds: int) -> dict[str, float]:
    """Returns kilobytes and milliseconds of the server's processor time for one generation, by transport.

    Args:
        rounds: Number of measurements; the median counts.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transports"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            native, web = server.stdout.readline().split()
            return asyncio.run(_measure(psutil.Process(server.pid), native, web, rounds))
        finally:
            server.kill()


async def _measure(server: psutil.Process, native: str, web: str, rounds: int) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for name in TRANSPORTS:
            link = await stack.enter_async_context(Link(native if name == "native" else web))
            clients[name] = link, await _stub(stack, name, link.address)
            await _generate(clients[name][1])  # the first one opens connections and fills caches
        for _ in range(rounds):
            for name, (link, stub) in clients.items():
                bytes_before, cpu_before = link.passed, _cpu_seconds(server)
                shown = [await _generate(stub) for _ in range(GENERATIONS)]
                found.setdefault(f"{name}_previews", []).append(statistics.mean(shown))
                found.setdefault(f"{name}_kilobytes", []).append((link.passed - bytes_before) / GENERATIONS / 1e3)
                cpu = (_cpu_seconds(server) - cpu_before) / GENERATIONS * 1e3
                found.setdefault(f"{name}_server_ms", []).append(cpu)
    medians = {f"generation_{name}": statistics.median(values) for name, values in found.items()}
    for name in TRANSPORTS[1:]:
        for what in ("kilobytes", "server_ms"):
            pairs = zip(found[f"{name}_{what}"], found[f"native_{what}"], strict=True)
            medians[f"generation_{name}_{what}_over_native"] = statistics.median(mine / its for mine, its in pairs)
    return medians


async def _stub(stack: contextlib.AsyncExitStack, name: str, address: str) -> Any:
    if name == "native":
        return GenerationServiceStub(await stack.enter_async_context(grpc.aio.insecure_channel(address)))
    if name == "grpc_web":
        return stack.enter_context(contextlib.closing(WebChannel(address))).stub()
    client = httpx.AsyncClient(base_url=f"http://{address}/v1", timeout=None, trust_env=False, verify=False)
    stub = (EventStub if name == "sse" else SocketStub)(client)
    stack.push_async_callback(stub.aclose)
    return stub


async def _generate(stub: Any) -> int:
    """Generates an image and returns the number of previews."""
    messages = [message async for message in stub.Generate(pb.GenerateRequest(prompt="a red apple", step_count=STEPS))]
    assert messages[-1].phase == pb.PHASE_SUCCEEDED
    return sum(message.image_kind == pb.IMAGE_KIND_PREDICTED for message in messages)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def main() -> None:
    """Serves until it is killed."""
    # Standard output carries only the address; the parent process reads no more.
    configure_logging("warning", "console")
    async with running(PacedEngine(), transport="sse") as service:
        native = NativeServer(service.services, Access())
        print(await native.start("127.0.0.1:0"), service.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
