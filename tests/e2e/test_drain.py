"""SIGTERM during generations on both ports: every accepted generation gets a typed end."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from support.grpcweb import Connection, WebChannel, header_dict
from support.process import BridgeProcess, ServerProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PATIENCE = 100
CALLS = 4
"""Calls on each port. Two generations run, the others wait."""


@dataclass
class Received:
    """Messages and status that one caller received."""

    messages: list[pb.Progress] = field(default_factory=list)
    status: grpc.StatusCode | None = None
    retry_after: float | None = None
    reason: str | None = None


async def follow(channel: Any, received: Received, steps: int, seed: int = 0) -> AsyncIterator[None]:
    """Follows one generation and records messages and status; yields after each message."""
    call = GenerationServiceStub(channel).Generate(pb.GenerateRequest(prompt="fox", step_count=steps, seed=seed))
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            received.messages.append(message)
            yield
        received.status = grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        received.status = error.code()
        retry, info = RetryInfo(), ErrorInfo()
        status = rpc_status.from_call(error)
        for detail in [] if status is None else status.details:
            if detail.Unpack(retry):
                received.retry_after = retry.retry_delay.ToMilliseconds() / 1000
            elif detail.Unpack(info):
                received.reason = info.reason


@contextlib.asynccontextmanager
async def load(*ports: tuple[str, str], steps: int) -> AsyncIterator[list[Received]]:
    """Starts generations; yields what their callers receive once all are accepted and two run; waits for all ends.

    Args:
        ports: Kind and address of each port.
        steps: Steps of each generation.
    """
    results: list[Received] = []
    loaded = asyncio.Event()

    async def caller(kind: str, address: str, received: Received) -> None:
        async with opened(kind, address) as channel:
            async for _ in follow(channel, received, steps, seed=results.index(received)):
                running = sum(each.messages[-1].phase == pb.PHASE_DENOISING for each in results if each.messages)
                if running >= 2 and all(each.messages for each in results):
                    loaded.set()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
        for kind, address in ports * CALLS:
            results.append(Received())
            tasks.create_task(caller(kind, address, results[-1]))
        await loaded.wait()
        yield results


@contextlib.asynccontextmanager
async def opened(kind: str, address: str) -> AsyncIterator[Any]:
    """Opens a channel to a port."""
    if kind == "native":
        # With gRPC's shared pool, a channel could use the connection of an earlier one.
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(address, options) as channel:
            yield channel
    else:
        with contextlib.closing(WebChannel(address)) as channel:
            yield channel


def server_with(cache_dir: Path, grace: int) -> ServerProcess:
    """Returns a server with two slots and a drain time of `grace` seconds."""
    return ServerProcess("--cache-dir", str(cache_dir), "--max-active", "2", "--drain-seconds", str(grace))


def ports_of(server: ServerProcess) -> list[tuple[str, str]]:
    """Returns kind and address of both ports."""
    return [("native", server.address), ("web", server.web_address)]


async def terminate(process: ServerProcess) -> None:
    """Sends SIGTERM and waits until the process drains."""
    process.terminate()
    await asyncio.to_thread(process.wait_for_log, "draining")


async def assert_ended_well(process: ServerProcess) -> None:
    """Checks that the process ended with exit code 0 and without a traceback."""
    assert await asyncio.to_thread(process.process.wait, PATIENCE) == 0
    assert not [line for line in process.log if "Traceback" in line]


async def assert_rejected(kind: str, address: str) -> None:
    """Checks that a new call is rejected: the gRPC port is closed, the web port answers with a reason and a delay."""
    received = Received()
    async with opened(kind, address) as channel:
        async for _ in follow(channel, received, steps=5):
            pass
    assert (received.messages, received.status) == ([], grpc.StatusCode.UNAVAILABLE)
    assert received.reason == (None if kind == "native" else "DRAINING")
    assert received.retry_after is None or received.retry_after > 0


def assert_typed_end(received: Received) -> None:
    """Checks for the image and OK, or for a typed end and UNAVAILABLE, both with a retry delay."""
    last = received.messages[-1]
    if last.phase == pb.PHASE_SUCCEEDED:
        assert last.image
        assert received.status is grpc.StatusCode.OK
    else:
        assert (last.phase, last.error.reason) == (pb.PHASE_FAILED, "DRAINING")
        assert last.error.retry_delay.ToMilliseconds() > 0
        assert received.status is grpc.StatusCode.UNAVAILABLE
        assert received.retry_after > 0


def succeeded(results: list[Received]) -> list[bool]:
    """Returns for each caller whether it received an image."""
    return [received.messages[-1].phase == pb.PHASE_SUCCEEDED for received in results]


@pytest.mark.slow
async def test_with_enough_time_all_accepted_generations_finish(cache_dir: Path) -> None:
    """Running and queued generations finish on both ports, new calls are rejected, and the exit code is 0."""
    with server_with(cache_dir, 90) as server:
        async with load(*ports_of(server), steps=20) as results:
            await terminate(server)
            for kind, address in ports_of(server):
                await assert_rejected(kind, address)
        for received in results:
            assert_typed_end(received)
        assert all(succeeded(results))
        await assert_ended_well(server)


@pytest.mark.parametrize("grace", [pytest.param(0, marks=pytest.mark.slow), 1])
async def test_without_enough_time_all_callers_get_a_typed_end(cache_dir: Path, grace: int) -> None:
    """Callers of running and queued generations get a typed end and a status on both ports; the exit code is 0."""
    with server_with(cache_dir, grace) as server:
        async with load(*ports_of(server), steps=150) as results:
            await terminate(server)
        for received in results:
            assert_typed_end(received)
        assert not all(succeeded(results))
        await assert_ended_well(server)


@pytest.mark.slow
async def test_a_second_signal_skips_the_drain(cache_dir: Path) -> None:
    """A second SIGTERM ends a drain of an hour immediately, with typed ends."""
    with server_with(cache_dir, 3600) as server:
        async with load(*ports_of(server), steps=150) as results:
            await terminate(server)
            server.terminate()
        for received in results:
            assert_typed_end(received)
        assert not all(succeeded(results))
        await assert_ended_well(server)


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_bridge_drains_too(server: ServerProcess, hurried: bool) -> None:
    """A draining bridge is not ready, rejects new calls, ends every call with a status, and exits with code 0.

    After a second signal there is no typed end, because only the bridge stops, not the generations behind it.
    """
    with BridgeProcess("--upstream", server.address, "--drain-seconds", "90") as bridge:
        async with load(("web", bridge.web_address), steps=150 if hurried else 40) as results:
            await terminate(bridge)
            await assert_rejected("web", bridge.web_address)
            connection = await Connection.open(bridge.web_address)
            await connection.request("GET", "/readyz", {"host": bridge.web_address})
            head, _ = await connection.answer("GET")
            assert (head.status_code, header_dict(head)["connection"]) == (503, "close")
            connection.close()
            if hurried:
                bridge.terminate()
        if not hurried:
            assert all(succeeded(results))
        for received, has_image in zip(results, succeeded(results), strict=True):
            assert received.status is (grpc.StatusCode.OK if has_image else grpc.StatusCode.UNAVAILABLE)
            assert has_image or received.retry_after > 0
        await assert_ended_well(bridge)
