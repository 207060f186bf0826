"""SIGTERM in the middle of work on both ports: whatever was accepted is told how it ended."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from support.grpcweb import Connection, WebChannel
from support.process import BridgeProcess, ServerProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PATIENCE = 100
CALLS = 4
"""On each port. Two generations run, the others wait."""


@dataclass
class Told:
    """What one caller was told, up to the end of the call."""

    messages: list[pb.Progress] = field(default_factory=list)
    status: grpc.StatusCode | None = None
    retry_after: float | None = None


async def follow(channel: Any, told: Told, steps: int, seed: int = 0) -> AsyncIterator[None]:
    """Follows one generation and notes everything; yields after each message."""
    call = GenerationServiceStub(channel).Generate(pb.GenerateRequest(prompt="fox", step_count=steps, seed=seed))
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            told.messages.append(message)
            yield
        told.status = grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        told.status = error.code()
        info = RetryInfo()
        status = rpc_status.from_call(error)
        if status is not None and any(detail.Unpack(info) for detail in status.details):
            told.retry_after = info.retry_delay.ToMilliseconds() / 1000


@contextlib.asynccontextmanager
async def load(*ports: tuple[str, str], steps: int) -> AsyncIterator[list[Told]]:
    """Yields what callers are told, once two generations run and all have been accepted; waits for the ends.

    Args:
        ports: Kind and address of each.
        steps: Of each generation.
    """
    everybody: list[Told] = []
    begun = asyncio.Event()

    async def caller(kind: str, address: str, told: Told) -> None:
        async with opened(kind, address) as channel:
            async for _ in follow(channel, told, steps, seed=everybody.index(told)):
                running = sum(each.messages[-1].phase == pb.PHASE_DENOISING for each in everybody if each.messages)
                if running >= 2 and all(each.messages for each in everybody):
                    begun.set()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
        for kind, address in ports * CALLS:
            everybody.append(Told())
            tasks.create_task(caller(kind, address, everybody[-1]))
        await begun.wait()
        yield everybody


@contextlib.asynccontextmanager
async def opened(kind: str, address: str) -> AsyncIterator[Any]:
    """A channel to a port."""
    if kind == "native":
        async with grpc.aio.insecure_channel(address) as channel:
            yield channel
    else:
        with contextlib.closing(WebChannel(address)) as channel:
            yield channel


def server_with(cache_dir: Path, grace: int) -> ServerProcess:
    """A server with two slots."""
    return ServerProcess("--cache-dir", str(cache_dir), "--max-active", "2", "--drain-seconds", str(grace))


def ports_of(server: ServerProcess) -> list[tuple[str, str]]:
    """Both of them."""
    return [("native", server.address), ("web", server.web_address)]


async def terminate(process: ServerProcess) -> None:
    """Sends SIGTERM, and waits until it is heard."""
    process.terminate()
    await asyncio.to_thread(process.wait_for_log, "draining")


async def assert_ended_well(process: ServerProcess) -> None:
    """Exit code 0, without any traceback."""
    assert await asyncio.to_thread(process.process.wait, PATIENCE) == 0
    assert not [line for line in process.log if "Traceback" in line]


async def assert_refused(kind: str, address: str) -> None:
    """A new call is told when to come again."""
    told = Told()
    async with opened(kind, address) as channel:
        async for _ in follow(channel, told, steps=5):
            pass
    assert (told.messages, told.status) == ([], grpc.StatusCode.UNAVAILABLE)
    assert told.retry_after > 0


def assert_told(told: Told) -> None:
    """The picture and OK, or a typed end and UNAVAILABLE, both with the time after which to come again."""
    last = told.messages[-1]
    if last.phase == pb.PHASE_SUCCEEDED:
        assert last.image
        assert told.status is grpc.StatusCode.OK
    else:
        assert (last.phase, last.error.reason) == (pb.PHASE_FAILED, "DRAINING")
        assert last.error.retry_delay.ToMilliseconds() > 0
        assert told.status is grpc.StatusCode.UNAVAILABLE
        assert told.retry_after > 0


def succeeded(everybody: list[Told]) -> list[bool]:
    """Who has a picture."""
    return [told.messages[-1].phase == pb.PHASE_SUCCEEDED for told in everybody]


async def test_with_time_enough_everything_accepted_is_finished(cache_dir: Path) -> None:
    """Running and queued ones get their pictures on both ports, while new ones are refused; exit code 0."""
    with server_with(cache_dir, 90) as server:
        async with load(*ports_of(server), steps=40) as everybody:
            await terminate(server)
            for kind, address in ports_of(server):
                await assert_refused(kind, address)
        for told in everybody:
            assert_told(told)
        assert all(succeeded(everybody))
        await assert_ended_well(server)


@pytest.mark.parametrize("grace", [0, 1])
async def test_without_time_enough_everybody_is_told(cache_dir: Path, grace: int) -> None:
    """Nobody is left without a typed end and a status, on either port, running or queued; exit code 0."""
    with server_with(cache_dir, grace) as server:
        async with load(*ports_of(server), steps=150) as everybody:
            await terminate(server)
        for told in everybody:
            assert_told(told)
        assert not all(succeeded(everybody))
        await assert_ended_well(server)


async def test_a_second_signal_hurries(cache_dir: Path) -> None:
    """What would have had an hour is interrupted now, as typed as ever."""
    with server_with(cache_dir, 3600) as server:
        async with load(*ports_of(server), steps=150) as everybody:
            await terminate(server)
            server.terminate()
        for told in everybody:
            assert_told(told)
        assert not all(succeeded(everybody))
        await assert_ended_well(server)


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_bridge_drains_too(server: ServerProcess, hurried: bool) -> None:
    """It is not ready, takes nothing new, and ends every call with a status; exit code 0.

    In a hurry there is no typed end: it is the bridge that stops, not the generations behind it.
    """
    with BridgeProcess("--upstream", server.address, "--drain-seconds", "90") as bridge:
        async with load(("web", bridge.web_address), steps=150 if hurried else 40) as everybody:
            await terminate(bridge)
            await assert_refused("web", bridge.web_address)
            connection = await Connection.open(bridge.web_address)
            await connection.request("GET", "/readyz", {"host": bridge.web_address})
            assert (await connection.answer("GET"))[0].status_code == 503
            connection.close()
            if hurried:
                bridge.terminate()
        if not hurried:
            assert all(succeeded(everybody))
        for told, has_picture in zip(everybody, succeeded(everybody), strict=True):
            assert told.status is (grpc.StatusCode.OK if has_picture else grpc.StatusCode.UNAVAILABLE)
            assert has_picture or told.retry_after > 0
        await assert_ended_well(bridge)
