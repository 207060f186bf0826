"""What grpc-web costs beside native gRPC: the same servicer on both ports of one server, one after the other, in turns.

Both clients hand over messages as bytes, undecoded. That of grpc-web is the little that this needs (httptools and a
buffer); the one of the tests, on h11, would be slower than the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import httptools
import psutil
from google.protobuf.duration_pb2 import Duration

from benchmarks.scripted import MESSAGE_BYTES
from calotype.v1 import calotype_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    Read = Callable[[pb.GenerateRequest], AsyncIterator[bytes]]

MESSAGES = 16_000
"""Of each comparison, over all streams."""
PACED_MESSAGES = 100
PACE = Duration(nanos=5_000_000)
IDLE_STREAMS = 500
STREAMS_PER_CONNECTION = 100
"""Of native gRPC, which allows 256."""
STALL_SECONDS = 5
"""Well below the 20 s after which the server gives a stalled reader up."""

SHORT = pb.GenerateRequest(step_count=1)
ENDLESS = pb.GenerateRequest(step_count=1_000_000)

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
        """Processor time so far."""
        times = self.process.cpu_times()
        return times.user + times.system

    @property
    def memory(self) -> float:
        """Megabytes of its own; the kernel's socket buffers are not among them."""
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
            # Nobody waits for streams that never end.
            process.kill()


def measure(rounds: int) -> dict[str, float]:
    """Returns throughput, processor time and latency over grpc-web beside native gRPC, and what idlers cost.

    Args:
        rounds: How often each is measured; medians count.
    """
    results: dict[str, float] = {}
    with scripted_server() as server:
        results |= asyncio.run(throughput(server, 1, rounds))
        results |= asyncio.run(throughput(server, 16, rounds))
        results |= asyncio.run(latency(server, rounds))
    for port in ("native", "web"):
        # Each in a fresh process: what another has given back would be used again, and not be seen.
        with scripted_server() as server:
            results[f"idle_streams_{port}_mb"] = asyncio.run(idle(server, port))
        with scripted_server() as server:
            results[f"stalled_reader_{port}_mb"] = asyncio.run(stalled(server, port))
    return results


async def throughput(server: Server, streams: int, rounds: int) -> dict[str, float]:
    """Messages per second, and processor time of the server for each, over grpc-web and over native gRPC."""
    request = pb.GenerateRequest(step_count=MESSAGES // streams)

    async def timed(read: Read) -> tuple[float, float, float]:
        wall, own, theirs = time.perf_counter(), time.process_time(), server.cpu_seconds
        counts = await asyncio.gather(*(count(read(request)) for _ in range(streams)))
        assert counts == [request.step_count] * streams
        return time.perf_counter() - wall, time.process_time() - own, server.cpu_seconds - theirs

    async with native_client(server.native) as native:
        web = web_client(server.web)
        await timed(native), await timed(web)  # the first round warms up
        runs = [(await timed(native), await timed(web)) for _ in range(rounds)]
    results = {
        f"web_over_native{streams}": statistics.median(n[0] / w[0] for n, w in runs),
        f"web_server_cpu_over_native{streams}": statistics.median(w[2] / n[2] for n, w in runs),
    }
    for number, port in enumerate(("native", "web")):
        mine = [run[number] for run in runs]
        messages = MESSAGES // streams * streams
        results[f"{port}{streams}_messages_per_second"] = messages / statistics.median(wall for wall, _, _ in mine)
        # What the client costs: near 1 it would be the client that is measured.
        results[f"{port}{streams}_client_busy"] = statistics.median(own / wall for wall, own, _ in mine)
        results[f"{port}{streams}_server_busy"] = statistics.median(theirs / wall for wall, _, theirs in mine)
    return results


async def latency(server: Server, rounds: int) -> dict[str, float]:
    """Median milliseconds from the making of a message to its arrival, beyond those of native gRPC."""
    request = pb.GenerateRequest(step_count=PACED_MESSAGES, preview=pb.PreviewOptions(min_interval=PACE))

    async def delays(read: Read) -> float:
        arrived = [(time.monotonic_ns(), message) async for message in read(request)]
        return statistics.median(at - pb.Progress.FromString(message).sequence for at, message in arrived) / 1e6

    async with native_client(server.native) as native:
        web = web_client(server.web)
        runs = [(await delays(native), await delays(web)) for _ in range(rounds)]
    return {
        "web_added_latency_ms": statistics.median(w - n for n, w in runs),
        "native_latency_ms": statistics.median(n for n, _ in runs),
    }


async def idle(server: Server, port: str) -> float:
    """Megabytes that the server grows by when many streams wait for something to happen."""
    request = pb.GenerateRequest()
    async with contextlib.AsyncExitStack() as stack:

        async def open_streams(number: int) -> None:
            read = web_client(server.web)
            if port == "native":
                read = await stack.enter_async_context(native_client(server.native))
            streams = [await stack.enter_async_context(contextlib.aclosing(read(request))) for _ in range(number)]
            await asyncio.gather(*(anext(stream) for stream in streams))

        await open_streams(1)  # what comes with the first is not the streams' own
        before = server.memory
        for _ in range(IDLE_STREAMS // STREAMS_PER_CONNECTION):
            await open_streams(STREAMS_PER_CONNECTION)
        return server.memory - before


async def stalled(server: Server, port: str) -> float:
    """Megabytes that the server grows by, at most, for one who takes the first of a stream without end, and no more."""
    async with native_client(server.native) as native:
        await count(native(SHORT))
        await count(web_client(server.web)(SHORT))
    before = server.memory
    async with (stalled_native if port == "native" else stalled_web)(server):
        most, until = before, time.monotonic() + STALL_SECONDS
        while time.monotonic() < until:
            await asyncio.sleep(0.1)
            most = max(most, server.memory)
    return most - before


@contextlib.asynccontextmanager
async def stalled_native(server: Server) -> AsyncIterator[None]:
    """HTTP/2's window shuts."""
    async with grpc.aio.insecure_channel(server.native) as channel:
        call = channel.unary_stream(_METHOD)(ENDLESS.SerializeToString())
        await call.read()
        yield
        call.cancel()


@contextlib.asynccontextmanager
async def stalled_web(server: Server) -> AsyncIterator[None]:
    """TCP's window shuts."""
    with socket.create_connection(host_and_port(server.web)) as connection:
        connection.sendall(web_request(server.web, ENDLESS))
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        yield


@contextlib.asynccontextmanager
async def native_client(address: str) -> AsyncIterator[Read]:
    """A connection of its own, as channels to one address share one unless told not to."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        method = channel.unary_stream(_METHOD)

        async def read(request: pb.GenerateRequest) -> AsyncIterator[bytes]:
            async for message in method(request.SerializeToString()):
                yield message

        yield read


def web_client(address: str) -> Read:
    """A connection for each call, as a browser has it."""

    async def read(request: pb.GenerateRequest) -> AsyncIterator[bytes]:
        reader, writer = await asyncio.open_connection(*host_and_port(address), limit=2**20)
        try:
            writer.write(web_request(address, request))
            answer = _Answer()
            parser = httptools.HttpResponseParser(answer)
            while not answer.ended:
                parser.feed_data(await reader.read(2**18))
                for message in answer.take():
                    yield message
        finally:
            writer.close()

    return read


class _Answer:
    """Cuts the body into frames; `ended` when the one with the trailers has come."""

    def __init__(self) -> None:
        self.ended = False
        self._body = bytearray()

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        self._body += data

    def take(self) -> Iterator[bytes]:
        """Yields the messages that are complete."""
        body = self._body
        while len(body) >= 5:
            flags, length = struct.unpack_from(">BI", body)
            if len(body) < 5 + length:
                return
            content = bytes(memoryview(body)[5 : 5 + length])
            del body[: 5 + length]
            if flags & 0x80:
                self.ended = True
                assert b"grpc-status: 0" in content, content
            else:
                yield content


def web_request(address: str, request: pb.GenerateRequest) -> bytes:
    """The whole request of a call."""
    message = request.SerializeToString()
    head = (
        f"POST {_METHOD} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/grpc-web+proto\r\n"
        f"x-grpc-web: 1\r\ncontent-length: {5 + len(message)}\r\n\r\n"
    )
    return head.encode() + struct.pack(">BI", 0, len(message)) + message


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of an address."""
    host, _, port = address.rpartition(":")
    return host, int(port)


async def count(messages: AsyncIterator[bytes]) -> int:
    """Reads to the end and returns how many there were."""
    number = 0
    async for message in messages:
        assert len(message) > MESSAGE_BYTES
        number += 1
    return number
