"""Servers behind one address: whichever is asked, each generation is found where it is."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

import calotype
from calotype_server.api.service import Api
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
    """Addresses: of a server that passes on, of itself alone, of its sibling; what stops the sibling; and its own."""
    async with contextlib.AsyncExitStack() as stack:
        own = await stack.enter_async_context(running(FakeEngine()))
        sibling_stack = await stack.enter_async_context(contextlib.AsyncExitStack())
        sibling = await sibling_stack.enter_async_context(running(FakeEngine()))
        addresses = {each.generations.replica: each.address for each in (own, sibling)}

        async def ask() -> dict[str, str]:
            return addresses

        api = Api(LIMITS)
        api.open(own.generations)
        siblings = PeerReplicas(own.generations.replica, ask)
        stack.push_async_callback(siblings.close)
        native = NativeServer(Services(RoutingServicer(GenerationServicer(api, Access()), siblings)), Access())
        address = await native.start("127.0.0.1:0")
        stack.push_async_callback(native.stop, None)
        yield address, own.address, sibling.address, sibling_stack, own.generations


async def begun(address: str, seed: int) -> str:
    """The id of a generation that has been made there."""
    async with calotype.AsyncClient(address) as client:
        generation = client.generate("x", seed=seed)
        seen = [progress async for progress in generation]
        return seen[-1].generation_id


async def test_every_generation_is_reached_through_one_server(shared) -> None:
    """Its own and its sibling's: watched to the picture, listed newest first, cancelled and finished."""
    address, *alone, _, _ = shared
    ids = [await begun(each, seed) for seed, each in enumerate((*alone, *alone))]
    async with calotype.AsyncClient(address) as client:
        for generation_id in ids:
            assert (await client.watch(generation_id).result()).data
            assert await client.cancel(generation_id) == "succeeded"
            assert await client.finish(generation_id) == "succeeded"
        assert [each.generation_id async for each in client.generations(page_size=1)] == ids[::-1]


async def test_a_refusal_of_the_sibling_keeps_its_reason(shared) -> None:
    """What it does not know is not found, in its own words."""
    address, _, sibling, *_ = shared
    tag = (await begun(sibling, 1)).partition(".")[0]
    async with calotype.AsyncClient(address) as client:
        with pytest.raises(calotype.NotFound) as refused:
            await client.cancel(f"{tag}.nothing")
        assert refused.value.reason == "GENERATION_NOT_FOUND"
        with pytest.raises(calotype.NotFound) as refused:
            await client.watch(f"{tag}.nothing").result()
        assert refused.value.reason == "GENERATION_NOT_FOUND"


async def test_what_a_lost_sibling_had_is_another_servers(shared) -> None:
    """The reason tells clients to ask for it anew; lists are those of who is left."""
    address, own, sibling, stop, _ = shared
    kept, lost = await begun(own, 1), await begun(sibling, 2)
    await stop.aclose()
    async with calotype.AsyncClient(address) as client:
        with pytest.raises(calotype.NotFound) as refused:
            await client.cancel(lost)
        assert refused.value.reason == "OTHER_REPLICA"
        assert [each.generation_id async for each in client.generations()] == [kept]


async def test_who_takes_no_more_passes_on(shared) -> None:
    """New work is begun by a sibling, and what has been accepted is followed here; alone, it is a refusal."""
    address, own, sibling, stop, generations = shared
    kept = await begun(own, 1)
    generations.reject_new(retry_after=2.0)
    async with calotype.AsyncClient(address, retries=0) as client:
        passed_on = await begun(address, 2)
        assert passed_on.partition(".")[0] == (await begun(sibling, 3)).partition(".")[0]
        assert (await client.watch(passed_on).result()).data
        assert (await client.watch(kept).result()).data
        await stop.aclose()
        with pytest.raises(calotype.Unavailable) as refused:
            await client.generate("x").result()
        assert refused.value.retry_after == 2.0
