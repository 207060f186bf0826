"""Cuts connections and kills the server repeatedly while callers reconnect: `make soak`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter
from typing import TYPE_CHECKING

import grpc
import h11
import pytest

import calotype
from calotype.v1 import calotype_pb2 as pb
from support.grpcweb import WebChannel
from support.process import ServerProcess, free_address
from support.proxy import Link

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = float(os.environ.get("SECONDS", "120"))
CALLERS = 4
"""Callers on each port."""
PATIENCE = 300.0
"""Seconds after which a generation counts as stuck."""
POLICIES = ("cancel", "keep", "grace")
PROMPTS = ("a red apple", "fox", "banana", "umbrella")
STEPS = 12


def terms(policy: str) -> dict:
    """Returns the options for what happens to a generation without readers."""
    options: dict[str, dict[str, object]] = {
        "cancel": {},
        "keep": {"on_disconnect": "keep"},
        "grace": {"disconnect_grace": 1.0},
    }
    return options[policy]


async def native(client: calotype.AsyncClient, prompt: str, policy: str) -> bytes:
    """Generates an image with the Python client, which reconnects automatically."""
    generation, seen = client.generate(prompt, seed=5, steps=STEPS, **terms(policy)), []
    async for progress in generation:
        seen.append(progress)
    assert [each.sequence for each in seen] == sorted({each.sequence for each in seen})
    assert [each.step for each in seen] == sorted(each.step for each in seen)
    assert [each.phase.ended for each in seen].count(True) == 1
    return (await generation.result()).data


async def web(channel: WebChannel, prompt: str, policy: str, request_id: str) -> bytes:
    """Generates an image without a Calotype client: repeats the request with the same id until the image arrives."""
    request = pb.GenerateRequest(prompt=prompt, seed=5, step_count=STEPS, request_id=request_id)
    if policy == "keep":
        request.on_disconnect = pb.DISCONNECT_POLICY_KEEP
    if policy == "grace":
        request.disconnect_grace.seconds = 1
    while True:
        call, image = channel.stub().Generate(request), b""
        # All errors that a broken connection can cause.
        with contextlib.suppress(OSError, AssertionError, grpc.RpcError, h11.RemoteProtocolError):
            while (message := await call.read()) is not grpc.aio.EOF:
                if message.phase == pb.PHASE_SUCCEEDED:
                    image += message.image
                    if message.chunk_index + 1 == message.chunk_count:
                        return image
        call.cancel()
        await asyncio.sleep(0.1)


@pytest.mark.timeout(7200)
async def test_every_image_arrives_despite_cuts_and_crashes(tmp_path: Path) -> None:
    """On both ports and with every policy, each request gets one image, byte for byte equal to an undisturbed one."""
    chance = random.Random(int(os.environ.get("SEED", "0")))
    address, web_address = free_address(), free_address()
    options = ["--grpc-address", address, "--web-address", web_address, "--deterministic", "--log-level", "error"]
    options += ["--max-batch-rows", "8", "--max-active", "4"]
    state = ["--state", str(tmp_path / "state")]
    done: Counter[str] = Counter()
    kills = 0
    async with Link(address) as link, Link(web_address) as web_link:
        with contextlib.ExitStack() as servers:
            server = servers.enter_context(ServerProcess(*options, *state))
            async with calotype.AsyncClient(address) as calm:
                undisturbed = {
                    prompt: (await calm.generate(prompt, seed=5, steps=STEPS).result()).data for prompt in PROMPTS
                }
            until = asyncio.get_running_loop().time() + SECONDS

            async def caller(port: str, number: int) -> None:
                channel = WebChannel(web_link.address)
                async with calotype.AsyncClient(link.address, retries=1000) as client:
                    while asyncio.get_running_loop().time() < until:
                        prompt, policy = chance.choice(PROMPTS), chance.choice(POLICIES)
                        async with asyncio.timeout(PATIENCE):
                            try:
                                if port == "native":
                                    data = await native(client, prompt, policy)
                                else:
                                    data = await web(channel, prompt, policy, f"{number}-{done.total()}")
                            except calotype.Unavailable as error:
                                # A client reports a failed first contact immediately.
                                assert not error.reason, error
                                done["first contact failed"] += 1
                                await asyncio.sleep(0.1)
                                continue
                        assert data == undisturbed[prompt]
                        done[f"{port} {policy}"] += 1
                channel.close()

            async def trouble() -> None:
                nonlocal kills, server
                loop = asyncio.get_running_loop()
                next_kill = loop.time() + 10
                while loop.time() < until:
                    await asyncio.sleep(chance.uniform(0.05, 0.8))
                    chance.choice([link, web_link]).cut()
                    if loop.time() > next_kill:
                        server.process.kill()
                        await asyncio.to_thread(server.process.wait)
                        # Every second server starts without its state and has lost everything.
                        found = state if kills % 2 else []
                        server = await asyncio.to_thread(servers.enter_context, ServerProcess(*options, *found))
                        kills, next_kill = kills + 1, loop.time() + 10

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(trouble())
                for number in range(CALLERS):
                    tasks.create_task(caller("native", number))
                    tasks.create_task(caller("web", number))
            assert server.process.poll() is None
        print(f"\n{dict(done)}; {link.cuts + web_link.cuts} connections cut, server killed {kills} times")
    assert kills
    assert {f"{port} {policy}" for port in ("native", "web") for policy in POLICIES} <= set(done)
