"""Two servers are replaced one after the other; gRPC's own clients, without health checks or retries, lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from support.process import ServerProcess, free_address

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]

CALLERS = 2
"""Callers that share one channel."""

PATIENCE = 220
REQUEST = pb.GenerateRequest(prompt="fox", step_count=3)
OPTIONS = ("--handover-seconds", "2", "--drain-seconds", "30", "--max-queue", "64", "--threads", "1")


class Callers:
    """Callers that generate one image after the other over one channel.

    Attributes:
        ends: The tag of the server and the end of each call.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.ends: list[tuple[str, str]] = []
        self._stub = GenerationServiceStub(channel)
        self._stopping = False
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Generates images until `stop`."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CALLERS):
                tasks.create_task(self._call_repeatedly())

    async def reach(self, tag: str) -> None:
        """Waits until a call has ended well on the server with this tag."""
        while (tag, "image") not in self.ends:
            self._ended.clear()
            await self._ended.wait()

    def stop(self) -> None:
        """Lets the current calls end and starts no more."""
        self._stopping = True

    async def _call_repeatedly(self) -> None:
        while not self._stopping:
            messages: list[pb.Progress] = [pb.Progress()]
            try:
                messages += [each async for each in self._stub.Generate(REQUEST)]
                end = "image" if messages[-1].image else "no image"
            except grpc.aio.AioRpcError as error:
                end = f"{error.code().name}: {error.details()}"
            self.ends.append((messages[-1].generation_id.rpartition(".")[0], end))
            self._ended.set()


def started(cache_dir: Path, address: str) -> ServerProcess:
    """Returns a server on an address."""
    return ServerProcess("--cache-dir", str(cache_dir), "--grpc-address", address, *OPTIONS)


async def tag_of(address: str) -> str:
    """Returns the tag of the server at an address."""
    async with grpc.aio.insecure_channel(address) as channel:
        model = await GenerationServiceStub(channel).GetModel(pb.GetModelRequest(), wait_for_ready=True)
    return model.replica


async def test_a_rolling_update_loses_no_call(cache_dir: Path) -> None:
    """Channels with `pick_first` and `round_robin` get an image for every call, from the old servers and the new."""
    addresses = [free_address(), free_address()]
    target = f"ipv4:{','.join(addresses)}"
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(PATIENCE):
        servers = [started(cache_dir, address) for address in addresses]
        await asyncio.gather(*(asyncio.to_thread(stack.enter_context, server) for server in servers))
        policies: dict[str, Callers] = {}
        for policy in ("pick_first", "round_robin"):
            config = json.dumps({"loadBalancingConfig": [{policy: {}}]})
            options = (("grpc.service_config", config), ("grpc.use_local_subchannel_pool", 1))
            policies[policy] = Callers(await stack.enter_async_context(grpc.aio.insecure_channel(target, options)))
        running = [asyncio.create_task(callers.run()) for callers in policies.values()]
        await policies["round_robin"].reach(await tag_of(addresses[1]))
        for address, server in zip(addresses, servers, strict=True):
            server.terminate()
            assert await asyncio.to_thread(server.process.wait, PATIENCE) == 0
            await asyncio.to_thread(stack.enter_context, started(cache_dir, address))
            await policies["round_robin"].reach(await tag_of(address))
        for callers in policies.values():
            callers.stop()
        await asyncio.gather(*running)
    for callers in policies.values():
        assert {end for _, end in callers.ends} == {"image"}
