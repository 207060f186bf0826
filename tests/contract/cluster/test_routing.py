"""Several servers behind one address: each finds the generations of the others."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

import calotype
from calotype_server.api.service import GenerationService
from calotype_server.auth.access import Access
from calotype_server.transport.cluster.routing_servicer import PeerReplicas, RoutingServicer
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.servicer import GenerationServicer
from calotype_server.transport.grpc.services import Services
from support.engine.fake_engine import FakeEngine
from support.service import LIMITS, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from calotype_server.generations.lifecycle import Generations


@pytest.fixture
async def shared() -> AsyncIterator[tuple[str, str, str, contextlib.AsyncExitStack, Generations]]:
    """Yields three addresses, the stack that stops the other server, and the generations of the first one.

    The addresses are those of a routing server, of the same server without routing, and of the other server.
    """
    async with contextlib.AsyncExitStack() as stack:
        own = await stack.enter_async_context(running(FakeEngine()))
        other_stack = await stack.enter_async_context(contextlib.AsyncExitStack())
        other = await other_stack.enter_async_context(running(FakeEngine()))
        addresses = {each.generations.replica: each.address for each in (own, other)}

        async def list_addresses() -> dict[str, str]:
            return addresses

        api = GenerationService(LIMITS)
        api.open(own.generations)
        peer_replicas = PeerReplicas(own.generations.replica, list_addresses)
        stack.push_async_callback(peer_replicas.close)
        native = NativeServer(Services(RoutingServicer(GenerationServicer(api, Access()), peer_replicas)), Access())
        address = await native.start("127.0.0.1:0")
        stack.push_async_callback(native.stop, None)
        yield address, own.address, other.address, other_stack, own.generations


async def generate(address: str, seed: int) -> str:
    """Generates an image on a server and returns the id of the generation."""
    async with calotype.AsyncClient(address) as client:
        generation = client.generate("x", seed=seed)
        seen = [progress async for progress in generation]
        return seen[-1].generation_id


async def test_every_generation_is_reached_through_one_server(shared) -> None:
    """Generations of both servers can be watched, listed newest first, cancelled and finished."""
    address, *alone, _, _ = shared
    ids = [await generate(each, seed) for seed, each in enumerate((*alone, *alone))]
    async with calotype.AsyncClient(address) as client:
        for generation_id in ids:
            assert (await client.watch(generation_id).result()).data
            assert await client.cancel(generation_id) == "succeeded"
            assert await client.finish(generation_id) == "succeeded"
        assert [each.generation_id async for each in client.generations(page_size=1)] == ids[::-1]


async def test_errors_of_the_other_server_keep_their_reason(shared) -> None:
    """An unknown id on the other server is reported as GENERATION_NOT_FOUND."""
    address, _, other, *_ = shared
    tag = (await generate(other, 1)).partition(".")[0]
    async with calotype.AsyncClient(address) as client:
        with pytest.raises(calotype.NotFound) as rejected:
            await client.cancel(f"{tag}.nothing")
        assert rejected.value.reason == "GENERATION_NOT_FOUND"
        with pytest.raises(calotype.NotFound) as rejected:
            await client.watch(f"{tag}.nothing").result()
        assert rejected.value.reason == "GENERATION_NOT_FOUND"


async def test_generations_of_a_lost_server_belong_to_another_replica(shared) -> None:
    """The reason OTHER_REPLICA lets clients start over; lists contain the generations of the remaining server."""
    address, own, other, stop, _ = shared
    kept, lost = await generate(own, 1), await generate(other, 2)
    await stop.aclose()
    async with calotype.AsyncClient(address) as client:
        with pytest.raises(calotype.NotFound) as rejected:
            await client.cancel(lost)
        assert rejected.value.reason == "OTHER_REPLICA"
        assert [each.generation_id async for each in client.generations()] == [kept]


async def test_a_server_that_accepts_no_work_routes_it_to_another(shared) -> None:
    """New generations start on the other server, accepted ones stay, and without another server the call fails."""
    address, own, other, stop, generations = shared
    kept = await generate(own, 1)
    generations.reject_new(retry_after=2.0)
    async with calotype.AsyncClient(address, retries=0) as client:
        routed = await generate(address, 2)
        assert routed.partition(".")[0] == (await generate(other, 3)).partition(".")[0]
        assert (await client.watch(routed).result()).data
        assert (await client.watch(kept).result()).data
        await stop.aclose()
        with pytest.raises(calotype.Unavailable) as rejected:
            await client.generate("x").result()
        assert rejected.value.retry_after == 2.0


async def test_the_cancel_of_a_group_reaches_every_server(shared) -> None:
    """Members on both servers are cancelled, also if only the other server has some, and later ones are rejected."""
    address, own, other, *_ = shared
    for places in ((own, other), (other,)):
        group = str(len(places))
        for place in places:
            async with calotype.AsyncClient(place) as client:
                await client.generate("x", group=group).result()
        async with calotype.AsyncClient(address) as client:
            assert await client.cancel(group=group) == 0
        for place in (own, other):
            async with calotype.AsyncClient(place) as client:
                with pytest.raises(calotype.Cancelled) as rejected:
                    await client.generate("x", group=group).result()
                assert rejected.value.reason == "GROUP_CANCELLED"
    async with calotype.AsyncClient(address) as client:
        with pytest.raises(calotype.NotFound) as rejected:
            await client.cancel(group="unknown")
        assert rejected.value.reason == "GROUP_NOT_FOUND"
