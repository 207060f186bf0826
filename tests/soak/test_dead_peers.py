"""Frozen peers and peers behind an unplugged cable are detected on both ports: `make soak`.

A network namespace whose link goes down stands for the unplugged cable; it needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import calotype
from support.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS, EDGE = 1000, 512
"""An image that takes longer than any test in this file."""

CLIENTS = {
    "native": """
import sys, calotype
steps, edge = map(int, sys.argv[2:])
for progress in calotype.Client(sys.argv[1], retries=0).generate("fox", steps=steps, width=edge, height=edge):
    print(progress.generation_id, progress.phase, flush=True)
""",
    "web": """
import asyncio, sys
from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from support.grpcweb import WebChannel

async def main():
    steps, edge = map(int, sys.argv[2:])
    request = pb.GenerateRequest(prompt="fox", step_count=steps, width_px=edge, height_px=edge)
    call = GenerationServiceStub(WebChannel(sys.argv[1])).Generate(request)
    while True:
        message = await call.read()
        phase = pb.Phase.Name(message.phase).removeprefix("PHASE_").lower()
        print(message.generation_id, phase, flush=True)

asyncio.run(main())
""",
}


@contextlib.contextmanager
def cable() -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields an address on this side, the command prefix for the other side, and the command that unplugs the cable."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("a network namespace needs root and iproute2")
    # From a network reserved for tests (RFC 2544), between the two ends of a virtual cable.
    name, link, address = f"calotype{os.getpid()}", f"ct{os.getpid()}", "198.18.77"
    inside = ["ip", "netns", "exec", name]
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for command in (
            ["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name],
            ["ip", "address", "add", f"{address}.1/24", "dev", link],
            ["ip", "link", "set", link, "up"],
            [*inside, "ip", "address", "add", f"{address}.2/24", "dev", "eth0"],
            [*inside, "ip", "link", "set", "eth0", "up"],
        ):
            subprocess.run(command, check=True)
        # This side stays up, as with a switch in between, so the server is not notified.
        yield f"{address}.1", inside, [*inside, "ip", "link", "set", "eth0", "down"]
    finally:
        # Delete the link first, because the kernel removes the contents of a namespace with a delay.
        subprocess.run(["ip", "link", "del", link], check=False)
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("port", ["native", "web"])
@pytest.mark.parametrize("state", ["denoising", "queued"])
@pytest.mark.parametrize("fate", ["frozen", "pulled"])
def test_dead_peers_are_detected(port: str, state: str, fate: str) -> None:
    """The generation of a dead peer ends within the configured time, which frees its slot or its place in the queue."""
    with contextlib.ExitStack() as stack:
        host, inside, pull = stack.enter_context(cable()) if fate == "pulled" else ("127.0.0.1", [], [])
        server = stack.enter_context(
            ServerProcess(
                *("--grpc-address", f"{host}:0", "--web-address", f"{host}:0", "--max-active", "1"),
                *("--max-step-count", str(STEPS), "--other-sizes", "draw", "--insecure"),
            )
        )

        def caller(port: str, *inside: str) -> subprocess.Popen[str]:
            address = server.address if port == "native" else server.web_address
            command = [*inside, sys.executable, "-c", CLIENTS[port], address, str(STEPS), str(EDGE)]
            return stack.enter_context(running(command))

        first = caller("native") if state == "queued" else None
        if first is not None:
            wait_for(first, "denoising")
        victim = caller(port, *inside)
        generation_id = wait_for(victim, state)
        started = time.monotonic()
        if fate == "pulled":
            subprocess.run(pull, check=True)
        else:
            victim.send_signal(signal.SIGSTOP)
        if (port, state, fate) == ("web", "queued", "frozen"):
            # The kernel answers for a frozen process, and HTTP/1.1 has no ping: the client keeps its place in the queue
            # and is detected when its generation runs and it reads no previews.
            first.kill()
            started = time.monotonic()
        server.wait_for_log(generation_id, "outcome=ABANDONED", timeout=120)
        print(f"\n{port}, {state}, {fate}: detected after {time.monotonic() - started:.1f} s")


@pytest.mark.timeout(120)
def test_a_frozen_server_is_detected() -> None:
    """A client without a stall timeout detects a frozen server with pings, before its deadline."""
    with ServerProcess() as server, calotype.Client(server.address, retries=0, stall_timeout=None) as client:
        generation = iter(client.generate("fox", steps=150, timeout=45))
        next(generation)
        server.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(calotype.Unavailable):
            list(generation)
        print(f"\nserver frozen: detected after {time.monotonic() - started:.1f} s")
        server.process.send_signal(signal.SIGCONT)


def wait_for(client: subprocess.Popen[str], phase: str) -> str:
    """Returns the id of the client's generation when it reaches `phase`."""
    for line in client.stdout:
        generation_id, reached = line.split()
        if reached == phase:
            return generation_id
    raise AssertionError(f"the client ended before its generation was {phase}")


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Runs a client and kills it at the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()
