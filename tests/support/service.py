"""A real server around any engine, reached through the port under test."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import httpx

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.api.service import Api
from calotype_server.auth.access import Access
from calotype_server.generations.admission import Admission
from calotype_server.generations.estimates import StepTimeEstimator
from calotype_server.generations.lifecycle import Generations
from calotype_server.generations.retention import Retention
from calotype_server.images.encoder import Encoder
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.cluster.forwarder import Forwarder
from calotype_server.transport.cluster.upstreams import Upstreams
from calotype_server.transport.grpc.options import CHANNEL_OPTIONS
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.servicer import GenerationServicer
from calotype_server.transport.grpc.services import Services
from calotype_server.transport.web.server import WebServer
from calotype_server.types import PORT_LIMITS, Limits, PortLimits
from support.grpcweb import WebChannel
from support.http import EventStub, SocketStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from calotype_server.engine.protocol import Engine
    from calotype_server.generations.store import Store
    from calotype_server.transport.net.call_limits import CallLimiter
    from calotype_server.transport.web.metrics_endpoint import Render
    from support.authority import Authority

LIMITS = Limits(max_pixels=256 * 256, max_step_count=50, max_prompt_chars=200)

GRPC_TRANSPORTS = ("native", "grpc-web", "grpc-web-text", "bridge")
"""Ways to the same servicer; "bridge" is grpc-web that is passed on to the native port."""

TRANSPORTS = (*GRPC_TRANSPORTS, "sse", "websocket")
"""Ways to the same generations."""


@dataclass
class Service:
    """What a test may look at or pull."""

    address: str
    """Of the port under test."""
    channel: Any
    """Of gRPC; over HTTP the `WebServer`."""
    stub: Any
    api: Api
    generations: Generations
    services: Services
    admission: Admission
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
    heartbeat: float = 5.0,
    limits: Limits = LIMITS,
    ports: PortLimits = PORT_LIMITS,
    call_limiter: CallLimiter | None = None,
    access: Access | None = None,
    authority: Authority | None = None,
    transport: str = "native",
    observe: Observe = ignore,
    metrics: Render | None = None,
    web: dict[str, Any] | None = None,
) -> AsyncIterator[Service]:
    """Serves `engine` while the block runs; in plaintext to everybody, unless `authority` and `access` say so.

    `web` are further options of the web port.
    """
    access = access or Access()
    pace, dead = StepTimeEstimator(), []
    admission = Admission(pace, max_active=max_active, max_queue=max_queue)
    encoder = Encoder(observe=observe)
    ended = Retention(seconds=600, count=retained, size=2**24)
    generations = Generations(
        engine,
        admission,
        pace,
        encoder,
        ended,
        store,
        max_active=max_active,
        heartbeat=heartbeat,
        on_dead=lambda: dead.append(True),
        observe=observe,
    )
    api = Api(limits)
    await generations.restore()
    if opened:
        api.open(generations)
    services = Services(GenerationServicer(api, access))
    await services.set_serving(opened)
    try:
        options = {**(web or {}), "observe": observe, "metrics": metrics}
        port = _port(services, api, access, authority, transport, ports, call_limiter, options)
        async with port as (address, channel, stub):
            try:
                yield Service(address, channel, stub, api, generations, services, admission, dead)
            finally:
                engine.close()
                await generations.end_all()
    finally:
        generations.close()
        encoder.close()


@contextlib.asynccontextmanager
async def _port(
    services: Services,
    api: Api,
    access: Access,
    authority: Authority | None,
    transport: str,
    limits: PortLimits,
    call_limiter: CallLimiter | None,
    options: dict[str, Any],
) -> AsyncIterator[tuple[str, Any, Any]]:
    """Listens, and yields the address, a channel to it, over HTTP the server, and a stub."""
    certificates = authority and authority.certificates()
    async with contextlib.AsyncExitStack() as stack:
        if transport in ("native", "bridge"):
            native = NativeServer(
                services, access, certificates, limits=limits, call_limiter=call_limiter, observe=options["observe"]
            )
            address = await native.start("127.0.0.1:0")
            stack.push_async_callback(native.stop, None)
            connect = opener(authority)
            if transport == "native":
                # Those of the bridge are those of a client, too.
                channel = await stack.enter_async_context(connect(address, CHANNEL_OPTIONS))
                yield address, channel, GenerationServiceStub(channel)
                return
            upstreams = await stack.enter_async_context(Upstreams([address], connect))
            web = WebServer(
                "127.0.0.1:0",
                lambda server: server.add_generic_rpc_handlers([Forwarder(upstreams)]),
                Access(),
                certificates,
                is_ready=services.is_serving,
                limits=limits,
                transport="bridge",
                **options,
            )
        else:
            web = WebServer(
                "127.0.0.1:0",
                services.add_to,
                access,
                certificates,
                is_ready=services.is_serving,
                api=api,
                limits=limits,
                call_limiter=call_limiter,
                **options,
            )
        address = await web.start()
        stack.push_async_callback(web.stop, 0)
        if transport in ("sse", "websocket"):
            context = authority and authority.context()
            url = f"{'https' if context else 'http'}://{address}/v1"
            client = httpx.AsyncClient(base_url=url, timeout=None, trust_env=False, verify=context or False)
            stub = (EventStub if transport == "sse" else SocketStub)(client, context)
            stack.push_async_callback(stub.aclose)
            yield address, web, stub
            return
        web_channel = WebChannel(address, text=transport == "grpc-web-text", context=authority and authority.context())
        stack.callback(web_channel.close)
        yield address, web_channel, GenerationServiceStub(web_channel)


def opener(authority: Authority | None = None, *, shown: bool = True) -> Callable[[str, Any], grpc.aio.Channel]:
    """Makes native channels; `shown` is whether they show a certificate where one is asked for."""
    if authority is None:
        return lambda target, options: grpc.aio.insecure_channel(target, options)
    credentials = authority.credentials(shown=shown)
    return lambda target, options: grpc.aio.secure_channel(target, credentials, options)


def open_channel(address: str, authority: Authority | None = None, *, shown: bool = True) -> grpc.aio.Channel:
    """One of them."""
    return opener(authority, shown=shown)(address, CHANNEL_OPTIONS)


async def read_until(call, phase: pb.Phase.ValueType) -> pb.Progress:
    """Reads messages up to the first in `phase`."""
    while (message := await call.read()) is not grpc.aio.EOF:
        if message.phase == phase:
            return message
    raise AssertionError(f"the stream ended before {pb.Phase.Name(phase)}")
