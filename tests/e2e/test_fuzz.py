"""Hundreds of malformed requests: none is answered as a failure of the server, which does not grow or crash."""

from __future__ import annotations

import asyncio
import base64
import os
import random
import re
from collections import Counter
from typing import Any

import grpc
import psutil
import pytest

import calotype
from support import fuzz
from support.process import ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

COUNT = int(os.environ.get("FUZZ", "300"))
"""Number of malformed requests; a third each uses native gRPC, grpc-web and raw HTTP."""
AT_ONCE = 16
PATIENCE = 30.0
_NEVER = ("INTERNAL", "UNKNOWN", "DATA_LOSS")
_DETAILS = "grpc-status-details-bin"


async def native(address: str, chance: random.Random, count: int) -> Counter[str]:
    """Makes native calls with random requests and returns how often each status occurred."""
    ends: Counter[str] = Counter()
    pending = iter(range(count))

    async def caller(channel: grpc.aio.Channel) -> None:
        for _ in pending:
            method: Any = channel.unary_stream(fuzz.path(chance))
            call = method(fuzz.message(chance), metadata=fuzz.metadata(chance), timeout=PATIENCE)
            try:
                # A request that happens to be valid only needs its first message.
                await call.read()
                ends["answered"] += 1
                call.cancel()
            except grpc.aio.AioRpcError as error:
                ends[name_of(error.code().value[0], dict(error.trailing_metadata() or ()).get(_DETAILS, b""))] += 1

    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(caller(channel))
    return ends


async def raw(address: str, chance: random.Random, count: int, *, shaped: bool) -> Counter[str]:
    """Sends bytes to the web port: grpc-web calls if `shaped`, otherwise raw HTTP. Returns the counts of statuses."""
    ends: Counter[str] = Counter()
    pending = iter(range(count))
    host, _, port = address.rpartition(":")

    async def caller() -> None:
        for _ in pending:
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(_web_call(chance) if shaped else fuzz.http(chance))
                if not shaped:
                    writer.write_eof()
                async with asyncio.timeout(PATIENCE):
                    answer = await reader.read(200_000)
                    while not reader.at_eof() and len(answer) < 100_000 and b"grpc-status" not in answer:
                        more = await reader.read(200_000)
                        answer += more
                status = re.match(rb"HTTP/1\.1 (\d+)", answer)
                ends[status[1].decode() if status else "closed"] += 1
                if found := re.search(rb"grpc-status: ?(\d+)", answer):
                    details = re.search(rb"grpc-status-details-bin: ?([\w+/=]+)", answer)
                    ends[name_of(int(found[1]), base64.b64decode(details[1] + b"==") if details else b"")] += 1
            except ConnectionError:
                ends["closed"] += 1
            finally:
                writer.transport.abort()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(caller())
    return ends


def _web_call(chance: random.Random) -> bytes:
    body = fuzz.framed(chance)
    head = f"POST {fuzz.path(chance)} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += "content-type: application/grpc-web+proto\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def name_of(code: int, details: bytes) -> str:
    """Returns the name of a status code; of INTERNAL the reason, if it blames the request as statuscodes.md demands."""
    if code == grpc.StatusCode.INTERNAL.value[0] and b"REQUEST_UNREADABLE" in details:
        return "REQUEST_UNREADABLE"
    return next((each.name for each in grpc.StatusCode if each.value[0] == code), f"code {code}")


async def test_malformed_requests_are_rejected_without_damage() -> None:
    """There is no 500, 502 or 503, no crash, growth or traceback, and then an image is generated.

    There is no INTERNAL either, except for requests that cannot be read.
    """
    chance = random.Random(int(os.environ.get("SEED", "0")))
    with ServerProcess("--log-level", "warning", "--max-queue", "4") as server:
        process, share = psutil.Process(server.process.pid), COUNT // 3
        # Fills pools and caches first. Some damaged requests are still valid and generate an image.
        async with calotype.AsyncClient(server.address) as client:
            slots = range((await client.model()).max_active)
            await asyncio.gather(*(client.generate("fox", steps=10).result() for _ in slots))
        await native(server.address, chance, share // 4)
        await raw(server.web_address, chance, share // 4, shaped=False)
        before = process.memory_info().rss, process.num_fds(), process.num_threads()
        ends = {
            "native": await native(server.address, chance, share),
            "grpc-web": await raw(server.web_address, chance, share, shaped=True),
            "http": await raw(server.web_address, chance, share, shaped=False),
        }
        async with calotype.AsyncClient(server.address) as client:
            assert (await client.generate("a red apple", steps=2).result()).width == 128
        after = process.memory_info().rss, process.num_fds(), process.num_threads()
        counted = {port: dict(counts) for port, counts in ends.items()}
        print(f"\n{COUNT} requests: {counted}")  # noqa: T201
        print(f"bytes, files and threads: {before} -> {after}")  # noqa: T201
        assert server.process.poll() is None
    for port, counts in ends.items():
        assert not set(counts) & {*_NEVER, "500", "502", "503"}, (port, counts)
    assert not [line for line in server.log if "Traceback" in line or "call failed" in line], server.log
    assert after[0] <= 1.1 * before[0]
    # The second encoder thread starts when it is first needed.
    assert after[2] <= before[2] + 2
