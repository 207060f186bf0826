"""Measures the cost of a stream and a message for each part other than the device, on this machine.

It measures processor seconds, not wall time, because other work on the machine affects processor time far less.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from concurrent import futures
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import transports, web
from calotype.v1 import calotype_pb2 as pb
from calotype_server.generations.admission import Admission
from calotype_server.generations.estimates import StepTimeEstimator
from calotype_server.images.encoder import encode_preview
from calotype_server.transport.cluster.upstreams import Upstreams
from calotype_server.types import Job, Pixels, Timings
from support.process import BridgeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 5
STREAMS = 16
_PROBED = 50
_PROBE_SECONDS = 10
_EDGES = (128, 256, 512, 1024)
_QUEUES = (32, 256, 1024)
_SERVERS = (8, 512, 2048)
_MB = 1e6
_JOB = Job("a red apple", None, 1024, 1024, 28, 3.0, 0, "DDIMScheduler")
_BRIDGE = ("--log-level", "warning", "--max-calls-per-peer", "10000", "--max-connections-per-peer", "10000")


def measure() -> dict[str, float]:
    """Returns milliseconds of processor time, and kilobytes or megabytes, by name."""
    results: dict[str, float] = {}
    with web.scripted_server() as server:
        for port in web.PORTS:
            results[f"{port}_message_ms"] = asyncio.run(message(server, server, port))
        with bridge(server.native) as front:
            results["bridge_mb"] = front.memory
            results["bridge_message_ms"] = asyncio.run(message(front, front, "web"))
    for port in web.PORTS:
        with web.scripted_server() as server:
            results[f"{port}_idle_stream_kb"] = 1e3 * asyncio.run(web.idle(server, port)) / web.IDLE_STREAMS
    with web.scripted_server() as server, bridge(server.native) as front:
        results["bridge_idle_stream_kb"] = 1e3 * asyncio.run(web.idle(front, "web")) / web.IDLE_STREAMS
    results["bridge_probe_ms"] = probe()
    whole = transports.measure(2)
    results |= {
        name: whole[f"generation_{name}"] for name in ("native_server_ms", "grpc_web_server_ms", "native_previews")
    }
    results |= {f"routing{count}_ms": routing(count) for count in _SERVERS}
    results |= previews()
    results |= asyncio.run(admissions())
    return results


@contextmanager
def bridge(*upstreams: str) -> Iterator[web.Server]:
    """Runs a bridge in front of servers."""
    with BridgeProcess("--upstream", ",".join(upstreams), *_BRIDGE) as process:
        yield web.Server(psutil.Process(process.process.pid), "", process.web_address)


async def message(asked: web.Server, measured: web.Server, port: str) -> float:
    """Returns the processor milliseconds per message of 20 KB, with 16 streams as fast as they are read."""
    request = pb.GenerateRequest(step_count=web.MESSAGES // STREAMS)
    spent = []
    async with web.connected(asked, port) as generate:
        for number in range(ROUNDS + 1):
            before = measured.cpu_seconds
            await asyncio.gather(*(web.count(generate(request)) for _ in range(STREAMS)))
            if number:  # the first round warms up
                spent.append((measured.cpu_seconds - before) / web.MESSAGES)
    return 1e3 * statistics.median(spent)


def probe() -> float:
    """Returns the processor milliseconds of a bridge for one health check of one server."""

    class Well(health_pb2_grpc.HealthServicer):
        def Check(self, request: object, context: object) -> health_pb2.HealthCheckResponse:  # noqa: N802
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    server = grpc.server(futures.ThreadPoolExecutor(4))
    health_pb2_grpc.add_HealthServicer_to_server(Well(), server)
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        spent = []
        # All of 127.0.0.0/8 is this machine. The cost with a single server is the baseline.
        for count in (1, 1 + _PROBED):
            with bridge(*(f"127.0.0.{number + 1}:{port}" for number in range(count))) as front:
                time.sleep(2)  # until the bridge has checked each server once
                before = front.cpu_seconds
                time.sleep(_PROBE_SECONDS)
                spent.append((front.cpu_seconds - before) / _PROBE_SECONDS)
    finally:
        server.stop(0)
    return 1e3 * (spent[1] - spent[0]) / _PROBED


def routing(count: int) -> float:
    """Returns the milliseconds of a bridge's event loop to choose one of `count` servers, once per call."""
    # Channels connect lazily, so these addresses need no servers.
    upstreams = Upstreams([f"127.0.0.1:{number + 1}" for number in range(count)], lambda *_: None)
    started = time.process_time()
    for _ in range(20):
        upstreams.by_health()
    return 1e3 * (time.process_time() - started) / 20


def previews() -> dict[str, float]:
    """Returns milliseconds and kilobytes of a JPEG preview with quality 75: a smooth image with some noise."""
    results = {}
    for edge in _EDGES:
        ramp = np.linspace(0, 255, edge)
        picture = ramp[:, None, None] * [1, 0.5, 0] + ramp[None, :, None] * [0, 0.5, 1]
        noise = np.random.default_rng(0).normal(0, 4, picture.shape)
        pixels = Pixels(edge, edge, (picture + noise).clip(0, 255).astype(np.uint8).tobytes())
        data = encode_preview(pixels, edge, 75).data
        started = time.process_time()
        for _ in range(20):
            encode_preview(pixels, edge, 75)
        results[f"preview{edge}_ms"] = 1e3 * (time.process_time() - started) / 20
        results[f"preview{edge}_kb"] = len(data) / 1e3
    return results


async def admissions() -> dict[str, float]:
    """Returns the milliseconds of the event loop for one arrival and one departure, by queue length."""
    results = {}
    for waiting in _QUEUES:
        pace = StepTimeEstimator()
        pace.observe_step(_JOB, 0.1, 1)
        pace.observe_end(_JOB, Timings(encoding_prompt=0.1, decoding=0.1))
        admission = Admission(pace, max_active=8, max_queue=2 * waiting)
        for number in range(8 + waiting):
            admission.enter(_JOB, str(number), _ignore)
        started = time.process_time()
        for number in range(10):
            ticket = admission.enter(_JOB, f"new {number}", _ignore)
            # Positions are reported in the next iteration of the event loop.
            await asyncio.sleep(0)
            admission.leave(ticket)
            await asyncio.sleep(0)
        results[f"admission{waiting}_ms"] = 1e3 * (time.process_time() - started) / 10
    return results


def _ignore(position: int, remaining: float | None) -> None:
    """Stands for a caller that receives its queue position."""


if __name__ == "__main__":
    for name, value in measure().items():
        sys.stdout.write(f"{name:28} {value:10.3f}\n")
