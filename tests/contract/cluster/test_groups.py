"""A bridge in front of several servers cancels a group on all of them."""

from __future__ import annotations

import contextlib

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Access
from calotype_server.transport.cluster.forwarder import Forwarder
from calotype_server.transport.cluster.upstreams import Upstreams
from calotype_server.transport.web.server import WebServer
from support.engine.fake_engine import FakeEngine
from support.grpcweb import WebChannel
from support.service import opener, running


def member(group: str, seed: int) -> pb.GenerateRequest:
    """Returns the request of one member, which continues without readers."""
    return pb.GenerateRequest(prompt="a red apple", seed=seed, group=group, on_disconnect=pb.DISCONNECT_POLICY_KEEP)


async def code_of(call) -> grpc.StatusCode:
    """Returns the code of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    return caught.value.code()


async def test_a_bridge_cancels_a_group_on_all_servers() -> None:
    """Each server cancels its members, and a server that has none rejects those that arrive later."""
    engines = [FakeEngine(), FakeEngine()]
    async with contextlib.AsyncExitStack() as stack:
        services = []
        for engine in engines:
            engine.hold()
            services.append(await stack.enter_async_context(running(engine)))
        upstreams = await stack.enter_async_context(Upstreams([each.address for each in services], opener()))
        web = WebServer(
            "127.0.0.1:0",
            lambda server: server.add_generic_rpc_handlers([Forwarder(upstreams)]),
            Access(),
            is_ready=upstreams.is_serving,
        )
        channel = WebChannel(await web.start())
        stack.push_async_callback(web.stop, 0)
        stack.callback(channel.close)
        cancel = channel.stub().Cancel
        for seed, service in enumerate((*services, services[0])):
            await service.stub.Generate(member("cats", seed)).read()
        await services[1].stub.Generate(member("dogs", 9)).read()
        assert (await cancel(pb.CancelRequest(group="cats"))).cancelled_count == 3
        assert (await cancel(pb.CancelRequest(group="dogs"))).cancelled_count == 1
        assert await code_of(cancel(pb.CancelRequest(group="unknown"))) is grpc.StatusCode.NOT_FOUND
        for service in services:
            assert await code_of(service.stub.Generate(member("dogs", 8))) is grpc.StatusCode.CANCELLED
        for engine in engines:
            engine.allow()
