"""A server that loads its model, as its callers see it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from calotype import AsyncClient, Client, Phase, Unavailable
from calotype._status import from_rpc_error
from calotype.v1 import calotype_pb2 as pb
from support.engine.fake_engine import FakeEngine
from support.service import running

PROMPT = pb.GenerateRequest(prompt="a red apple")


async def test_callers_learn_when_to_try_again(grpc_transport: str) -> None:
    """Each method answers NOT_READY with a retry delay of at least a second, also through a bridge."""
    async with running(FakeEngine(), opened=False, transport=grpc_transport) as service:
        stub = service.stub
        for call in (
            stub.GetModel(pb.GetModelRequest()),
            stub.ListGenerations(pb.ListGenerationsRequest()),
            stub.Cancel(pb.CancelRequest(generation_id="g")),
            stub.Finish(pb.FinishRequest(generation_id="g")),
            stub.Generate(PROMPT).read(),
            stub.Watch(pb.WatchRequest(generation_id="g")).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = from_rpc_error(caught.value)
            assert (error.code, error.reason) == ("UNAVAILABLE", "NOT_READY")
            assert error.retry_after >= 1


async def test_a_client_of_several_servers_uses_the_ready_one_at_once() -> None:
    """While one of two servers loads, a client's generations succeed on the other one without a wait."""
    waits: list[float] = []

    def use(target: str) -> list[Phase]:
        with Client(target, on_reconnect=lambda _, delay: waits.append(delay)) as client:
            for _ in range(3):
                client.generate("a red apple").result()
            return [summary.phase for summary in client.generations()]

    async with running(FakeEngine(), opened=False) as loading, running(FakeEngine()) as ready:
        phases = await asyncio.to_thread(use, f"ipv4:{loading.address},{ready.address}")
    assert phases == [Phase.SUCCEEDED] * 3
    assert waits == []


async def test_several_loading_servers_are_no_failed_attempt() -> None:
    """While every server loads, gRPC fails calls itself; the client sees NOT_READY, as from a single server."""
    async with (
        running(FakeEngine(), opened=False) as one,
        running(FakeEngine(), opened=False) as other,
        AsyncClient(f"ipv4:{one.address},{other.address}", loading_timeout=0) as client,
    ):
        for call in (client.model(), client.generate("a red apple").result()):
            with pytest.raises(Unavailable) as caught:
                await call
            assert caught.value.reason == "NOT_READY"
