"""Targets of several servers, and stalled servers."""

import asyncio
import threading
from typing import Any

import pytest

import calotype
from calotype._channel import CHANNEL_OPTIONS, channel_options
from calotype.targets import is_balanced, parse_address, resolve
from calotype.v1 import calotype_pb2 as v1
from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer


@pytest.mark.parametrize(
    ("address", "balanced"),
    [
        ("localhost:50051", False),
        ("ipv4:127.0.0.1:50051", False),
        ("unix:/run/calotype.sock", False),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("dns:///calotype:50051", True),
    ],
)
def test_balanced_targets(address, balanced):
    """Targets that can stand for several servers are balanced; channels to others have no service config."""
    target = parse_address(address)
    assert is_balanced(target) is balanced
    assert (channel_options(target) == CHANNEL_OPTIONS) is not balanced


def test_resolve_finds_each_server():
    """Lists are split and names are resolved, with the authority of the certificate."""
    assert resolve("ipv4:10.0.0.1:1,10.0.0.2:2") == [
        ("ipv4:10.0.0.1:1", "10.0.0.1:1"),
        ("ipv4:10.0.0.2:2", "10.0.0.2:2"),
    ]
    assert ("ipv4:127.0.0.1:50051", "localhost:50051") in resolve("dns:///localhost:50051")
    assert resolve("dns:///127.0.0.1") == [("ipv4:127.0.0.1:443", "127.0.0.1")]
    assert resolve("dns:///[::1]:7") == [("ipv6:[::1]:7", "[::1]:7")]
    assert resolve("dns:///no-such-host.invalid:1") == []


@pytest.mark.parametrize("wrong", [0, -1, True, "5"])
def test_invalid_stall_timeout_raises(wrong):
    """Both clients reject a stall timeout that is not a positive number."""
    for kind in (calotype.Client, calotype.AsyncClient):
        with pytest.raises(ValueError, match="stall_timeout"):
            kind("localhost:1", stall_timeout=wrong)


class StallingServicer(GenerationServiceServicer):
    """Sends a number of messages, then stalls in its first call; later calls get the end."""

    def __init__(self, count):
        self.count, self.calls, self.over = count, 0, threading.Event()

    def Generate(self, request, context):  # noqa: N802
        """Stalls the first time."""
        self.calls += 1
        for sequence in range(1, self.count + 1):
            yield v1.Progress(generation_id="r.1", sequence=sequence, phase=v1.PHASE_QUEUED, seed=1)
        if self.calls == 1:
            self.over.wait()
        yield from self.Watch(request, context)

    def Watch(self, request, context):  # noqa: N802
        """Sends the end."""
        fields: dict[str, Any] = {"image": b"x", "image_kind": 2, "image_format": v1.IMAGE_FORMAT_PNG, "chunk_count": 1}
        yield v1.Progress(generation_id="r.1", sequence=9, phase=v1.PHASE_SUCCEEDED, seed=1, **fields)


@pytest.mark.parametrize("count", [0, 2])
async def test_stalled_server_counts_as_lost(serve, without_waits, count):
    """Both clients reconnect when a server stalls, also before its first message."""
    losses = []
    arguments: dict[str, Any] = {"stall_timeout": 0.3, "on_reconnect": lambda error, _: losses.append(str(error))}
    servicer = StallingServicer(count)
    with serve(servicer) as address:
        with without_waits(calotype.Client(address, **arguments)) as client:
            image = await asyncio.to_thread(client.generate("x").result)
            assert image.data == b"x"
        servicer.calls = 0
        async with without_waits(calotype.AsyncClient(address, **arguments)) as client:
            assert (await client.generate("x").result()).data == b"x"
        servicer.over.set()
    assert losses == ["The server has sent nothing for 0.3 s."] * 2


async def test_slow_reader_is_not_a_stall(serve):
    """A slow reader does not make the server count as stalled."""
    losses = []
    servicer = StallingServicer(2)
    servicer.over.set()
    with serve(servicer) as address:
        kept: dict[str, Any] = {"stall_timeout": 0.2, "on_reconnect": lambda error, _: losses.append(error)}
        with calotype.Client(address, **kept) as client:
            for _ in client.generate("x"):
                await asyncio.sleep(0.5)
    assert not losses
