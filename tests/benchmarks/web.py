"""Compares grpc-web with native gRPC: the same servicer on both ports of one server, in alternating rounds.

Both clients return messages as bytes, without decoding them. The grpc-web client comes from the tests. It took 0.02 to
0.03 ms of processor time for a message of 20 KB, and grpcio's client 0.03 to 0.06 ms, so it does not limit grpc-web.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import psutil
from google.protobuf.duration_pb2 import Duration

from benchmarks.scripted import MESSAGE_BYTES
from calotype.v1 import calotype_pb2 as pb
from support.grpcweb import WebChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    Generate = Callable[[pb.GenerateRequest], Any]

PORTS = ("native", "web")

MESSAGES = 16_000
"""Messages of each comparison, over all streams."""
PACED_MESSAGES = 100
PACE = Duration(nanos=5_000_000)
IDLE_STREAMS = 500
STREAMS_PER_CONNECTION = 100
"""For native gRPC, which allows 256."""
STALL_SECONDS = 5
"""Well below the 20 s after which the server drops a stalled reader."""

_METHOD = "/calotype.v1.GenerationService/Generate"
_MB = 1e6


@dataclass(frozen=True)
class Server:
    """A scripted server and its two addresses."""

    process: psutil.Process
    native: str
    web: str

    @property
    def cpu_seconds(self) -> float:
        """Processor time used so far."""
        times = self.process.cpu_times()
        return times.user + times.system

    @property
    def memory(self) -> float:
        """Private memory in megabytes, without the kernel's socket buffers."""
        return self.process.memory_full_info().uss / _MB


@contextlib.contextmanager
def scripted_server() -> Iterator[Server]:
    """Runs `benchmarks.scripted`."""
    command = [sys.executable, "-m", "benchmarks.scripted"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            native, web = process.stdout.readline().split()
            yield Server(psutil.Process(process.pid), native, web)
        finally:
            # Some streams never end, so the server would never stop without this.
            process.kill()


def measure(rounds: int) -> dict[str, float]:
    """Returns throughput, processor time and latency of grpc-web relative to native gRPC, and memory of idle streams.

    Args:
        rounds: Number of measurements; the median counts.
    """
    results: dict[str, float] = {}
    with scripted_server() as server:
        results |= asyncio.run(throughput(server, 1, rounds))
        results |= asyncio.run(throughput(server, 16, rounds))
        results |= asyncio.run(latency(server, rounds))
    for port in PORTS:
        # Each in a new process: otherwise memory that an earlier measurement freed is reused and not counted.
        with scripted_server() as server:
            results[f"idle_streams_{port}_mb"] = asyncio.run(idle(server, port))
        with scripted_server() as server:
            results[f"stalled_reader_{port}_mb"] = asyncio.run(stalled(server, port))
    return results


async def throughput(server: Server, streams: int, rounds: int) -> dict[str, float]:
    """Returns messages per second and processor time of the server per message, over grpc-web and native gRPC."""
    request = pb.GenerateRequest(step_count=MESSAGES // streams)

    async def timed(generate: Generate) -> tuple[float, float, float]:
        wall, own, theirs = time.perf_counter(), time.process_time(), server.cpu_seconds
        counts = await asyncio.gather(*(count(generate(request)) for _ in range(streams)))
        assert counts == [request.step_count] * streams
        return time.perf_counter() - wall, time.process_time() - own, server.cpu_seconds - theirs

    async with connected(server, "native") as native, connected(server, "web") as web:
        await timed(native), await timed(web)  # the first round warms up
        runs = [(await timed(native), await timed(web)) for _ in range(rounds)]
    results = {
        f"web_over_native{streams}": statistics.median(n[0] / w[0] for n, w in runs),
        f"web_server_cpu_over_native{streams}": statistics.median(w[2] / n[2] for n, w in runs),
    }
    for port, mine in zip(PORTS, zip(*runs, strict=True), strict=True):
        messages = MESSAGES // streams * streams
        results[f"{port}{streams}_messages_per_second"] = messages / statistics.median(wall for wall, _, _ in mine)
        # Share of time that the client is busy: near 1, the client is the bottleneck.
        results[f"{port}{streams}_client_busy"] = statistics.median(own / wall for wall, own, _ in mine)
        results[f"{port}{streams}_server_busy"] = statistics.median(theirs / wall for wall, _, theirs in mine)
    return results


async def latency(server: Server, rounds: int) -> dict[str, float]:
    """Returns the median milliseconds from creation to arrival of a message, in addition to native gRPC's."""
    request = pb.GenerateRequest(step_count=PACED_MESSAGES, preview=pb.PreviewOptions(min_interval=PACE))

    async def delays(generate: Generate) -> float:
        arrived = [(time.monotonic_ns(), message) async for message in generate(request)]
        return statistics.median(at - pb.Progress.FromString(message).sequence for at, message in arrived) / 1e6

    async with connected(server, "native") as native, connected(server, "web") as web:
        runs = [(await delays(native), await delays(web)) for _ in range(rounds)]
    return {
        "web_added_latency_ms": statistics.median(w - n for n, w in runs),
        "native_latency_ms": statistics.median(n for n, _ in runs),
    }


async def idle(server: Server, port: str) -> float:
    """Returns the megabytes that many idle streams add to the server."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_streams(number: int) -> None:
            generate = await stack.enter_async_context(connected(server, port))
            calls = [generate(pb.GenerateRequest()) for _ in range(number)]
            for call in calls:
                stack.callback(call.cancel)
            await asyncio.gather(*(call.read() for call in calls))

        await open_streams(1)  # the first stream also allocates shared memory, which must not count
        before = server.memory
        for _ in range(IDLE_STREAMS // STREAMS_PER_CONNECTION):
            await open_streams(STREAMS_PER_CONNECTION)
        return server.memory - before


async def stalled(server: Server, port: str) -> float:
    """Returns the maximum megabytes that a reader adds if it reads one message of an endless stream and then stops."""
    async with connected(server, port) as generate:
        await count(generate(pb.GenerateRequest(step_count=1)))
        before = most = server.memory
        call = generate(pb.GenerateRequest(step_count=1_000_000))
        await call.read()
        until = time.monotonic() + STALL_SECONDS
        while time.monotonic() < until:
            await asyncio.sleep(0.1)
            most = max(most, server.memory)
        call.cancel()
    return most - before


@contextlib.asynccontextmanager
async def connected(server: Server, port: str) -> AsyncIterator[Generate]:
    """Yields the method over native gRPC on a separate connection, or over grpc-web with one connection per call."""
    if port == "web":
        with contextlib.closing(WebChannel(server.web)) as channel:
            yield channel.unary_stream(_METHOD, pb.GenerateRequest.SerializeToString)
        return
    # Without this option, channels to one address share a connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.native, options=options) as channel:
        yield channel.unary_stream(_METHOD, pb.GenerateRequest.SerializeToString)


async def count(call: Any) -> int:
    """Reads to the end and returns the number of messages."""
    number = 0
    async for message in call:
        assert len(message) > MESSAGE_BYTES
        number += 1
    return number
