"""Several servers: calls reach the server that has the generation, from native clients and through a bridge."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

import calotype
from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Access
from calotype_server.generations.store import Store
from calotype_server.transport.cluster.forwarder import Forwarder
from calotype_server.transport.cluster.upstream import Upstream
from calotype_server.transport.cluster.upstreams import Upstreams
from calotype_server.transport.web.server import WebServer
from support.engine.fake_engine import FakeEngine
from support.grpcweb import WebChannel
from support.keyring import Keyring
from support.lab import NAME, handlers, lab, until
from support.service import Service, opener, read_until, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

KEEP = pb.DISCONNECT_POLICY_KEEP


@dataclass
class Pair:
    """Two servers, and ways to reach both."""

    services: list[Service]
    engines: list[FakeEngine]
    target: str
    bridge: Any
    """Speaks grpc-web to a bridge in front of both."""
    is_ready: Callable[[], Awaitable[bool]]


@contextlib.asynccontextmanager
async def bridge(upstreams: Upstreams) -> AsyncIterator[WebChannel]:
    """Runs a bridge to these servers while the block runs, and yields a channel to it."""
    web = WebServer(
        "127.0.0.1:0",
        lambda server: server.add_generic_rpc_handlers([Forwarder(upstreams)]),
        Access(),
        is_ready=upstreams.is_serving,
    )
    channel = WebChannel(await web.start())
    try:
        yield channel
    finally:
        channel.close()
        await web.stop(0)


@contextlib.asynccontextmanager
async def pair(**options) -> AsyncIterator[Pair]:
    """Runs two servers, with held engines, while the block runs."""
    engines = [FakeEngine(), FakeEngine()]
    async with contextlib.AsyncExitStack() as stack:
        services = []
        for engine in engines:
            engine.hold()
            services.append(await stack.enter_async_context(running(engine, **options)))
        addresses = [service.address for service in services]
        upstreams = await stack.enter_async_context(Upstreams(addresses, opener()))
        channel = await stack.enter_async_context(bridge(upstreams))
        target = f"ipv4:{','.join(addresses)}"
        yield Pair(services, engines, target, channel.stub(), upstreams.is_serving)


def kept(seed: int) -> pb.GenerateRequest:
    """Returns a request for a generation that continues without readers."""
    return pb.GenerateRequest(prompt="a red apple", seed=seed, on_disconnect=KEEP)


async def reason_of(call) -> str:
    """Returns the reason of a call that fails with NOT_FOUND."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    info = ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    return info.reason


async def test_a_quiet_generation_sends_heartbeats(transport: str) -> None:
    """In the queue and during a long step, messages come whose sequence rises while nothing else changes."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, heartbeat=0.02, transport=transport) as service:
        first = service.stub.Generate(pb.GenerateRequest(prompt="x", seed=1))
        await read_until(first, pb.PHASE_DENOISING)
        second = service.stub.Generate(pb.GenerateRequest(prompt="x", seed=2))
        for call in (first, second):
            received = [await call.read() for _ in range(6)][-3:]
            assert [each.sequence for each in received] == sorted({each.sequence for each in received})
            assert len({(each.phase, each.step, each.queue_position) for each in received}) == 1
            call.cancel()
        engine.allow()


async def test_a_generation_id_names_its_server(transport: str) -> None:
    """Another server reports OTHER_REPLICA; the named server reports an unknown id as GENERATION_NOT_FOUND."""
    async with running(FakeEngine(), transport=transport) as service:
        made = await service.stub.Generate(pb.GenerateRequest(prompt="x")).read()
        replica = (await service.stub.GetModel(pb.GetModelRequest())).replica
        assert made.generation_id.startswith(f"{replica}.")
        for generation_id, reason in ((f"{replica}.x", "GENERATION_NOT_FOUND"), ("other.x", "OTHER_REPLICA")):
            assert await reason_of(service.stub.Watch(pb.WatchRequest(generation_id=generation_id))) == reason
            assert await reason_of(service.stub.Cancel(pb.CancelRequest(generation_id=generation_id))) == reason


async def test_the_state_folder_keeps_the_replica_tag(tmp_path) -> None:
    """Ids from before a restart still lead to the server with their state folder; another folder has another tag."""
    tags = []
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        store = await Store.open(folder)
        async with running(FakeEngine(), store=store) as service:
            tags.append((await service.stub.GetModel(pb.GetModelRequest())).replica)
        await store.close()
    assert tags[0] == tags[1] != tags[2]


async def test_native_clients_reach_generations_on_every_server() -> None:
    """Generations alternate between servers; other clients can watch, finish, cancel and list all of them."""
    async with pair(max_active=4) as servers:
        async with calotype.AsyncClient(servers.target) as client:
            ids = []
            for seed in range(4):
                async for progress in client.generate("x", seed=seed, on_disconnect="keep"):
                    if progress.phase == "denoising":
                        break
                ids.append(progress.generation_id)
        async with calotype.AsyncClient(servers.target) as other:
            assert [each.generation_id async for each in other.generations(page_size=1)] == ids[::-1]
            assert await other.cancel(ids[0]) == "denoising"
            assert await other.finish(ids[1]) == "denoising"
            watched = [other.watch(each) for each in ids[1:]]
            for engine in servers.engines:
                engine.allow()
            assert all([await each.result() for each in watched])
            assert [each.seed for each in watched] == [1, 2, 3]
            assert watched[0].progress.finished_early
            with pytest.raises(calotype.Cancelled):
                await other.watch(ids[0]).result()

        def from_a_thread() -> None:
            with calotype.Client(servers.target) as client:
                assert [each.generation_id for each in client.generations(page_size=3)] == ids[::-1]
                watched = [client.watch(each) for each in ids[1:]]
                assert [each.result() and each.seed for each in watched] == [1, 2, 3]
                assert client.cancel(ids[0]) == client.finish(ids[0]) == "cancelled"
                with pytest.raises(calotype.NotFound) as caught:
                    client.watch("other.x").result()
                assert caught.value.reason == "OTHER_REPLICA"

        await asyncio.to_thread(from_a_thread)


async def test_leaving_a_loop_cancels_on_the_right_server() -> None:
    """Both clients cancel by id on the server that has the generation."""
    async with pair(max_active=8) as servers:

        async def leave() -> None:
            async with calotype.AsyncClient(servers.target) as client:
                for seed in (1, 2):
                    async for progress in (generation := client.generate("x", seed=seed)):
                        if progress.phase == "denoising":
                            break
                    del generation

        def leave_from_a_thread() -> None:
            with calotype.Client(servers.target) as client:
                for seed in (1, 2):
                    for progress in client.generate("x", seed=seed):
                        if progress.phase == "denoising":
                            break

        for leaving in (leave(), asyncio.to_thread(leave_from_a_thread)):
            await leaving
            stops = [stop for engine in servers.engines for stop in engine.stops]
            await until(lambda stops=stops: all(stop.is_set() for stop in stops))
        assert len(stops) == 4


@pytest.mark.parametrize("way", ["client", "bridge"])
async def test_a_stopping_server_gets_no_new_generations_and_keeps_its_own(way: str) -> None:
    """New generations go to the other server, before and after the health changes; its own can still be watched."""
    async with pair(max_active=4) as servers, calotype.AsyncClient(servers.target) as client:
        stopping, other = servers.services

        async def make(seed: int) -> bytes:
            if way == "client":
                return (await client.generate("x", seed=seed).result()).data
            call = servers.bridge.Generate(pb.GenerateRequest(prompt="x", seed=seed))
            return (await read_until(call, pb.PHASE_SUCCEEDED)).image

        old = await stopping.stub.Generate(kept(7)).read()
        for engine in servers.engines:
            engine.allow()
        stopping.generations.reject_new(retry_after=60)
        assert all([await make(seed) for seed in (1, 2, 3)])
        await stopping.services.set_serving(False)
        assert all([await make(seed) for seed in (4, 5, 6)])
        assert {job.seed for job in servers.engines[0].jobs} == {7}
        assert {job.seed for job in servers.engines[1].jobs} == {1, 2, 3, 4, 5, 6}
        if way == "client":
            watched = client.watch(old.generation_id)
            assert await watched.result()
            assert watched.seed == 7
        else:
            watched = servers.bridge.Watch(pb.WatchRequest(generation_id=old.generation_id))
            assert (await read_until(watched, pb.PHASE_SUCCEEDED)).seed == 7
            assert await servers.is_ready()
            await other.services.set_serving(False)
            assert not await servers.is_ready()


async def test_browsers_reach_generations_on_every_server() -> None:
    """A bridge starts generations on the less busy server, and finds, finishes, cancels and lists all of them."""
    async with pair(max_active=4) as servers:
        calls, ids = [], []
        for seed in range(4):
            calls.append(servers.bridge.Generate(kept(seed)))
            ids.append((await read_until(calls[-1], pb.PHASE_DENOISING)).generation_id)
        assert sorted(len(engine.jobs) for engine in servers.engines) == [2, 2]
        listed, token = [], ""
        while token or not listed:
            page = await servers.bridge.ListGenerations(pb.ListGenerationsRequest(page_size=3, page_token=token))
            listed.append([each.seed for each in page.generations])
            token = page.next_page_token
        order = [seed for each in listed for seed in each]
        assert ([len(each) for each in listed], sorted(order)) == ([3, 1], [0, 1, 2, 3])
        assert (await servers.bridge.Cancel(pb.CancelRequest(generation_id=ids[0]))).phase == pb.PHASE_DENOISING
        assert (await servers.bridge.Finish(pb.FinishRequest(generation_id=ids[1]))).phase == pb.PHASE_DENOISING
        watched = [servers.bridge.Watch(pb.WatchRequest(generation_id=each)) for each in ids]
        for engine in servers.engines:
            engine.allow()
        assert (await read_until(watched[0], pb.PHASE_CANCELLED)).seed == 0
        assert [(await read_until(each, pb.PHASE_SUCCEEDED)).seed for each in watched[1:]] == [1, 2, 3]
        with pytest.raises(grpc.aio.AioRpcError, match="page_size"):
            await servers.bridge.ListGenerations(pb.ListGenerationsRequest(page_size=101))
        for call in calls:
            call.cancel()


async def test_a_bridge_retries_a_full_queue_on_the_next_server() -> None:
    """The error reaches the client only if all queues are full."""
    async with pair(max_queue=0) as servers:
        direct = servers.services[0].stub.Generate(kept(9))
        await read_until(direct, pb.PHASE_DENOISING)
        call = servers.bridge.Generate(kept(1))
        assert (await call.read()).seed == 1
        await read_until(call, pb.PHASE_DENOISING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await servers.bridge.Generate(kept(2)).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [job.seed for engine in servers.engines for job in engine.jobs] == [9, 1]
        direct.cancel()
        call.cancel()


async def test_a_bridge_passes_on_the_answer_of_the_only_server_that_it_reaches() -> None:
    """A server that cannot be reached does not hide why the other one rejects a call."""
    engine = FakeEngine()
    engine.hold()
    async with (
        running(engine, max_queue=0) as service,
        Upstreams([service.address, "127.0.0.1:1"], opener()) as upstreams,
        bridge(upstreams) as channel,
    ):
        call = service.stub.Generate(kept(1))
        await read_until(call, pb.PHASE_DENOISING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.stub().Generate(kept(2)).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        call.cancel()


async def test_generations_of_a_lost_server_are_not_found() -> None:
    """Another server answers NOT_FOUND to a bridge and to a client."""
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(contextlib.suppress(grpc.aio.AioRpcError))
        engine = FakeEngine()
        staying = await stack.enter_async_context(running(FakeEngine()))
        leaving = contextlib.AsyncExitStack()
        gone = await leaving.enter_async_context(running(engine))
        addresses = [staying.address, gone.address]
        async with (
            Upstreams(addresses, opener()) as upstreams,
            calotype.AsyncClient(f"ipv4:{','.join(addresses)}") as client,
        ):
            made = await gone.stub.Generate(kept(1)).read()
            owner = await upstreams.owner_of(made.generation_id, ())
            assert owner is not None
            assert owner.target == gone.address
            assert await client.cancel(made.generation_id)
            await leaving.aclose()
            await upstreams.probe()
            assert await upstreams.owner_of(made.generation_id, ()) is None
            assert [each.target for each in upstreams.by_health()] == addresses
            with pytest.raises(calotype.NotFound) as caught:
                await client.watch(made.generation_id).result()
            assert caught.value.reason == "OTHER_REPLICA"


async def test_a_bridge_identifies_servers_with_the_callers_key(tmp_path) -> None:
    """A server that requires keys identifies itself only if the caller has a valid one."""
    keyring = Keyring(tmp_path / "keys.toml")
    keyring.add("alice")
    async with (
        running(FakeEngine(), access=keyring.access()) as service,
        Upstreams([service.address], opener()) as upstreams,
    ):
        authorization = keyring.metadata("alice")
        made = await service.stub.Generate(kept(1), metadata=authorization).read()
        assert await upstreams.owner_of(made.generation_id, ()) is None
        assert await upstreams.owner_of(made.generation_id, authorization) is not None


async def test_a_bridge_repeats_a_call_that_a_stopping_server_cancelled() -> None:
    """GRPC cancels calls that reach a server after it has stopped, without details; the next server answers them."""
    reached = []

    async def cancelled(request: bytes, context: Any) -> None:
        reached.append(request)
        await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for method in (cancelled, echo):
            server = grpc.aio.server()
            server.add_generic_rpc_handlers([handlers({"Echo": method})])
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            stack.push_async_callback(server.stop, 0)
        upstreams = await stack.enter_async_context(Upstreams(addresses, opener()))
        channel = await stack.enter_async_context(bridge(upstreams))
        for number in range(4):
            assert await channel.unary_unary(f"/{NAME}/Echo")(b"%d" % number) == b"%d" % number
    assert reached


async def test_a_status_of_grpc_itself_gets_a_reason_from_the_bridge() -> None:
    """A status without details, such as that of a request that is too large, has the name of its code as the reason."""

    async def full(request: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "Too far.")

    async with lab("bridge", {"Full": full}) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stream("Full").read()
    info = ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert (caught.value.code(), info.reason, info.domain) == (grpc.StatusCode.OUT_OF_RANGE, "OUT_OF_RANGE", "calotype")


async def test_calls_above_the_limit_of_a_connection_use_another_one() -> None:
    """250 calls start at once on several connections to a server that allows each connection 100 calls."""
    waiting, go = [], asyncio.Event()

    async def wait(request, context):
        waiting.append(request)
        await go.wait()
        yield request

    server = grpc.aio.server(options=[("grpc.max_concurrent_streams", 100)])
    server.add_generic_rpc_handlers([handlers({"Wait": wait})])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    upstream = Upstream(address, opener(), (("grpc.use_local_subchannel_pool", 1),))

    async def call() -> bytes:
        with upstream.channel() as channel:
            method: Any = channel.unary_stream(f"/{NAME}/Wait")
            return await method(b"x").read()

    calls = [asyncio.create_task(call()) for _ in range(250)]
    await until(lambda: len(waiting) == 250)
    assert upstream.active_calls == 250
    go.set()
    assert await asyncio.gather(*calls) == [b"x"] * 250
    assert upstream.active_calls == 0
    await upstream.close()
    await server.stop(None)
