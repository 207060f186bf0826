"""Several servers behind one target: callers notice only a delay when servers are killed, frozen or replaced."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from typing import TYPE_CHECKING

import grpc
import pytest

import calotype
from calotype.v1 import calotype_pb2 as pb
from support.callers import STEPS, Job, until
from support.grpcweb import WebChannel
from support.process import BridgeProcess, ServerProcess, free_address

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e

JOBS = 40
PROMPTS = ("a red apple", "fox", "banana", "umbrella")
OPTIONS = (
    "--deterministic",
    "--max-batch-rows",
    "8",
    "--max-active",
    "4",
    "--heartbeat-seconds",
    "0.5",
    "--threads",
    "1",
    "--max-queue",
    "64",
)


async def started(processes: contextlib.ExitStack, cache_dir: Path, *addresses: str) -> list[ServerProcess]:
    """Starts servers at the same time and waits until they are ready."""
    options = ("--cache-dir", str(cache_dir), *OPTIONS)
    servers = [ServerProcess(*options, "--grpc-address", address) for address in addresses]
    return await asyncio.gather(*(asyncio.to_thread(processes.enter_context, server) for server in servers))


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_forty_callers_survive_a_frozen_and_a_killed_server(cache_dir: Path) -> None:
    """One server gets SIGSTOP, the other SIGKILL: each image is correct and generated once, and none keeps running."""
    step = asyncio.Event()
    with contextlib.ExitStack() as processes:
        first, second = await started(processes, cache_dir, "127.0.0.1:0", "127.0.0.1:0")
        target = f"ipv4:{first.address},{second.address}"
        async with calotype.AsyncClient(target, stall_timeout=2.0, retries=100) as client:
            undisturbed = {
                prompt: (await client.generate(prompt, seed=5, steps=STEPS).result()).data for prompt in PROMPTS
            }
            async with calotype.AsyncClient(first.address) as one, calotype.AsyncClient(second.address) as other:
                killed, frozen = (await one.model()).replica, (await other.model()).replica
            jobs = [Job(prompt) for prompt, _ in zip(itertools.cycle(PROMPTS), range(JOBS), strict=False)]
            running = [asyncio.create_task(job.run(client, step)) for job in jobs]
            await until(lambda: any(job.is_halfway(frozen) for job in jobs), step)
            second.freeze()
            await until(lambda: any(job.homes[:2] == [frozen, killed] for job in jobs), step)
            second.thaw()
            await until(lambda: any(job.is_halfway(killed) for job in jobs), step)
            first.process.kill()
            pictures = await asyncio.gather(*running)
            assert any(job.homes[-2:] == [killed, frozen] for job in jobs)
            async with asyncio.timeout(60):
                # Generations on the frozen server end without readers after their callers moved to the other one.
                while not all([each.phase.ended async for each in client.generations()]):  # noqa: ASYNC110 - no event to wait for
                    await asyncio.sleep(0.2)
            made = Counter([each.request_id async for each in client.generations() if each.phase == "succeeded"])
    assert set(made.values()) == {1}
    for job, picture in zip(jobs, pictures, strict=True):
        assert picture == undisturbed[job.prompt]
        assert [each.sequence for each in job.seen] == sorted({each.sequence for each in job.seen})
        assert [each.step for each in job.seen] == sorted(each.step for each in job.seen)
        assert [each.phase.ended for each in job.seen].count(True) == 1


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_rolling_update_interrupts_no_stream(cache_dir: Path) -> None:
    """Two servers are replaced after SIGTERM while native callers and browsers stream; no stream is interrupted.

    The browser calls do not use our client, which could retry. Native callers stay on the server they started with.
    """
    addresses = [free_address(), free_address()]
    step = asyncio.Event()
    jobs: list[Job] = []
    updated = asyncio.Event()
    with contextlib.ExitStack() as processes:
        servers = await started(processes, cache_dir, *addresses)
        bridge = processes.enter_context(BridgeProcess("--upstream", ",".join(addresses)))

        async def native(client: calotype.AsyncClient) -> None:
            while not updated.is_set():
                jobs.append(Job("fox"))
                assert await jobs[-1].run(client, step)

        async def web() -> int:
            channel, pictures = WebChannel(bridge.web_address), 0
            while not updated.is_set():
                call = channel.stub().Generate(pb.GenerateRequest(prompt="fox", step_count=STEPS))
                while (message := await call.read()) is not grpc.aio.EOF:
                    pictures += message.phase == pb.PHASE_SUCCEEDED
            channel.close()
            return pictures

        async with calotype.AsyncClient(f"ipv4:{','.join(addresses)}") as client:
            before = [replica async for replica in tags(addresses)]
            callers = [asyncio.create_task(native(client)) for _ in range(4)]
            browsers = [asyncio.create_task(web()) for _ in range(2)]
            for address, server in zip(addresses, servers, strict=True):
                done = len(jobs)
                await until(lambda done=done: len(jobs) > done + 4, step)
                server.terminate()
                assert await asyncio.to_thread(server.process.wait, 60) == 0
                await started(processes, cache_dir, address)
            after = [replica async for replica in tags(addresses)]
            async with asyncio.timeout(60):
                await until(lambda: set(after) <= {home for job in jobs for home in job.homes}, step)
            updated.set()
            await asyncio.gather(*callers)
            assert all(await asyncio.gather(*browsers))
    assert not set(before) & set(after)
    assert [len(job.homes) for job in jobs] == [1] * len(jobs)


async def tags(addresses: list[str]):
    """Yields the tag of each server."""
    for address in addresses:
        async with calotype.AsyncClient(address) as client:
            yield (await client.model()).replica
