"""A real server around any engine, reached through the port under test."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.admission import Admission
from calotype_server.encode import Encoder
from calotype_server.estimates import Pace
from calotype_server.generations import Generations
from calotype_server.retention import Retention
from calotype_server.transport.forwarding import Forwarder
from calotype_server.transport.native import NativeServer
from calotype_server.transport.servicer import GenerationServicer
from calotype_server.transport.services import Services
from calotype_server.transport.upstreams import CHANNEL_OPTIONS, Upstreams
from calotype_server.transport.web import WebServer
from calotype_server.types import Limits
from support.grpcweb import WebChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from calotype_server.engine.protocol import Engine
    from calotype_server.store import Store

LIMITS = Limits(max_pixels=256 * 256, max_step_count=50, max_prompt_chars=200)

TRANSPORTS = ("native", "grpc-web", "grpc-web-text", "bridge")
"""Ways to the same servicer; "bridge" is grpc-web that is passed on to the native port."""


@dataclass
class Service:
    """What a test may look at or pull."""

    address: str
    """Of the port under test."""
    channel: Any
    stub: GenerationServiceStub
    generations: Generations
    services: Services
    dead: list[bool]


@contextlib.asynccontextmanager
async def running(
    engine: Engine,
    *,
    max_queue: int = 4,
    max_active: int = 1,
    retained: int = 16,
    store: Store | None = None,
    opened: bool = True,
    limits: Limits = LIMITS,
    transport: str = "native",
) -> AsyncIterator[Service]:
    """Serves `engine` while the block runs."""
    pace, dead = Pace(), []
    admission = Admission(pace, max_active=max_active, max_queue=max_queue)
    encoder = Encoder()
    ended = Retention(seconds=600, count=retained, size=2**24)
    generations = Generations(
        engine, admission, pace, encoder, ended, store, max_active=max_active, on_dead=lambda: dead.append(True)
    )
    servicer = GenerationServicer(limits)
    await generations.restore()
    if opened:
        servicer.open(generations)
    services = Services(servicer)
    await services.set_serving(opened)
    try:
        async with _port(services, transport) as (address, channel):
            stub = GenerationServiceStub(channel)
            try:
                yield Service(address, channel, stub, generations, services, dead)
            finally:
                engine.close()
                await generations.end_all()
    finally:
        generations.close()
        encoder.close()


@contextlib.asynccontextmanager
async def _port(services: Services, transport: str) -> AsyncIterator[tuple[str, Any]]:
    """Listens, and yields the address and a channel to it."""
    async with contextlib.AsyncExitStack() as stack:
        if transport in ("native", "bridge"):
            native = NativeServer(services)
            address = await native.start("127.0.0.1:0")
            stack.push_async_callback(native.stop, None)
            if transport == "native":
                # Those of the bridge are those of a client, too.
                yield address, await stack.enter_async_context(connect(address, CHANNEL_OPTIONS))
                return
            upstreams = await stack.enter_async_context(Upstreams([address], connect))
            web = WebServer(
                "127.0.0.1:0",
                lambda server: server.add_generic_rpc_handlers([Forwarder(upstreams)]),
                is_ready=services.is_serving,
            )
        else:
            web = WebServer("127.0.0.1:0", services.add_to, is_ready=services.is_serving)
        address = await web.start()
        stack.push_async_callback(web.stop, 0)
        web_channel = WebChannel(address, text=transport == "grpc-web-text")
        stack.callback(web_channel.close)
        yield address, web_channel


def connect(target: str, options) -> grpc.aio.Channel:
    """Makes a channel without encryption."""
    return grpc.aio.insecure_channel(target, options)


async def read_until(call, phase: pb.Phase.ValueType) -> pb.Progress:
    """Reads messages up to the first in `phase`."""
    while (message := await call.read()) is not grpc.aio.EOF:
        if message.phase == phase:
            return message
    raise AssertionError(f"the stream ended before {pb.Phase.Name(phase)}")
