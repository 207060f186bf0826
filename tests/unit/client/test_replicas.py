"""Targets that stand for several servers, and servers that fall silent."""

import asyncio
import threading

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
def test_which_targets_are_balanced(address, balanced):
    """Those that may stand for several; the others keep the channel that they had."""
    target = parse_address(address)
    assert is_balanced(target) is balanced
    assert (channel_options(target) == CHANNEL_OPTIONS) is not balanced


def test_each_server_can_be_reached_alone():
    """Lists are taken apart, and names looked up, with the name that a certificate is for."""
    assert resolve("ipv4:10.0.0.1:1,10.0.0.2:2") == [
        ("ipv4:10.0.0.1:1", "10.0.0.1:1"),
        ("ipv4:10.0.0.2:2", "10.0.0.2:2"),
    ]
    assert ("ipv4:127.0.0.1:50051", "localhost:50051") in resolve("dns:///localhost:50051")
    assert resolve("dns:///127.0.0.1") == [("ipv4:127.0.0.1:443", "127.0.0.1")]
    assert resolve("dns:///[::1]:7") == [("ipv6:[::1]:7", "[::1]:7")]
    assert resolve("dns:///no-such-host.invalid:1") == []


@pytest.mark.parametrize("wrong", [0, -1, True, "5"])
def test_how_long_to_wait_must_be_a_time(wrong):
    """By both clients, where the mistake was made."""
    for kind in (calotype.Client, calotype.AsyncClient):
        with pytest.raises(ValueError, match="stall_timeout"):
            kind("localhost:1", stall_timeout=wrong)


class Silent(GenerationServiceServicer):
    """Tells so many messages of a generation, and then nothing more; whoever comes back gets the end."""

    def __init__(self, told):
        self.told, self.calls, self.over = told, 0, threading.Event()

    def Generate(self, request, context):  # noqa: N802
        """Falls silent the first time."""
        self.calls += 1
        for sequence in range(1, self.told + 1):
            yield v1.Progress(generation_id="r.1", sequence=sequence, phase=v1.PHASE_QUEUED, seed=1)
        if self.calls == 1:
            self.over.wait()
        yield from self.Watch(request, context)

    def Watch(self, request, context):  # noqa: N802
        """Ends."""
        fields = {"image": b"x", "image_kind": 2, "image_format": v1.IMAGE_FORMAT_PNG, "chunk_count": 1}
        yield v1.Progress(generation_id="r.1", sequence=9, phase=v1.PHASE_SUCCEEDED, seed=1, **fields)


@pytest.mark.parametrize("told", [0, 2])
async def test_a_server_that_falls_silent_is_lost(serve, at_once, told):
    """Both clients leave the call and come back, also before the first message; without a limit they would wait."""
    losses = []
    arguments = {"stall_timeout": 0.3, "on_reconnect": lambda error, _: losses.append(str(error))}
    silent = Silent(told)
    with serve(silent) as address:
        with at_once(calotype.Client(address, **arguments)) as client:
            image = await asyncio.to_thread(client.generate("x").result)
            assert image.data == b"x"
        silent.calls = 0
        async with at_once(calotype.AsyncClient(address, **arguments)) as client:
            assert (await client.generate("x").result()).data == b"x"
        silent.over.set()
    assert losses == ["The server has sent nothing for 0.3 s."] * 2


async def test_a_reader_who_takes_its_time_is_not_taken_for_a_silent_server(serve):
    """What counts is the wait for a message, not the time between two."""
    losses = []
    silent = Silent(2)
    silent.over.set()
    with serve(silent) as address:
        kept = {"stall_timeout": 0.2, "on_reconnect": lambda error, _: losses.append(error)}
        with calotype.Client(address, **kept) as client:
            for _ in client.generate("x"):
                await asyncio.sleep(0.5)
    assert not losses
