"""A real server around any engine, reached through the port under test."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import httpx

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.api.service import GenerationService
from calotype_server.auth.access import Access
from calotype_server.limits import PORT_LIMITS, Limits, PortLimits
from calotype_server.observability.events import Observe, ignore
from calotype_server.transport.cluster.forwarder import Forwarder
from calotype_server.transport.cluster.upstreams import Upstreams
from calotype_server.transport.grpc.options import CHANNEL_OPTIONS
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.servicer import GenerationServicer
from calotype_server.transport.grpc.services import Services
from calotype_server.transport.net.proxies import NO_PROXIES, TrustedProxies
from calotype_server.transport.web.server import WebServer
from support.grpcweb import WebChannel
from support.http import EventStub, SocketStub
from support.runtime import running_runtime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from calotype_server.apps.runtime import Runtime
    from calotype_server.engine.protocol import Engine
    from calotype_server.generations.admission import Admission
    from calotype_server.generations.lifecycle import Generations
    from calotype_server.generations.store import Store
    from calotype_server.transport.net.call_limits import CallLimiter
    from calotype_server.transport.web.metrics_endpoint import Render
    from support.authority import Authority

LIMITS = Limits(max_pixels=256 * 256, max_step_count=50, max_prompt_chars=200)

GRPC_TRANSPORTS = ("native", "grpc-web", "grpc-web-text", "bridge")
"""Transports to the same servicer; "bridge" is grpc-web that is forwarded to the native port."""

TRANSPORTS = (*GRPC_TRANSPORTS, "sse", "websocket")
"""Transports to the same generations."""


@dataclass
class Service:
    """A running server under test. `address` is that of the port under test.

    `channel` is a gRPC channel; for HTTP transports it is the `WebServer`.
    """

    address: str
    channel: Any
    stub: Any
    api: GenerationService
    services: Services
    runtime: Runtime
    engine: Any

    @property
    def generations(self) -> Generations:
        """All generations."""
        return self.runtime.generations

    @property
    def admission(self) -> Admission:
        """The queue."""
        return self.runtime.admission


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
    proxies: TrustedProxies = NO_PROXIES,
    web: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> AsyncIterator[Service]:
    """Serves `engine` during the block: in plaintext and without keys, unless `authority` and `access` are given.

    Args:
        engine: The engine; its model then has `max_active` slots.
        max_queue: Places in the queue.
        max_active: Slots.
        retained: Number of ended generations to retain.
        store: Keeps generations across restarts.
        opened: Whether the service accepts requests; otherwise it answers as if the model were still loading.
        heartbeat: Seconds between heartbeats.
        limits: Limits for requests.
        ports: Limits for connections and calls.
        call_limiter: Counts calls by host.
        access: Identifies callers.
        authority: Issues the certificates for TLS.
        transport: One of `TRANSPORTS`.
        observe: Receives all events.
        metrics: Renders `/metrics`.
        proxies: Trusted by the server; a bridge trusts those in `web`.
        web: Further arguments of `WebServer`.
        settings: Further fields of `Settings`.
    """
    access = access or Access()
    api = GenerationService(limits)
    services = Services(GenerationServicer(api, access, proxies))
    options = {**(web or {}), "observe": observe, "metrics": metrics}
    async with (
        _port(services, api, access, authority, transport, ports, call_limiter, proxies, options) as (
            address,
            channel,
            stub,
        ),
        running_runtime(
            engine,
            service=api if opened else None,
            store=store,
            observe=observe,
            max_active=max_active,
            max_queue=max_queue,
            retain_count=retained,
            retain_bytes=2**24,
            heartbeat_seconds=heartbeat,
            **(settings or {}),
        ) as runtime,
    ):
        await services.set_serving(opened)
        yield Service(address, channel, stub, api, services, runtime, engine)


@contextlib.asynccontextmanager
async def _port(
    services: Services,
    api: GenerationService,
    access: Access,
    authority: Authority | None,
    transport: str,
    limits: PortLimits,
    call_limiter: CallLimiter | None,
    proxies: TrustedProxies,
    options: dict[str, Any],
) -> AsyncIterator[tuple[str, Any, Any]]:
    """Opens the port; yields its address, a channel to it (the server for HTTP transports), and a stub."""
    certificates = authority.certificates() if authority else None
    async with contextlib.AsyncExitStack() as stack:
        if transport in ("native", "bridge"):
            native = NativeServer(
                services,
                access,
                certificates,
                limits=limits,
                call_limiter=call_limiter,
                observe=options["observe"],
                proxies=proxies,
            )
            address = await native.start("127.0.0.1:0")
            stack.push_async_callback(native.stop, None)
            connect = opener(authority)
            if transport == "native":
                # The bridge and clients use the same options.
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
                service=api,
                limits=limits,
                call_limiter=call_limiter,
                **{"proxies": proxies, **options},
            )
        address = await web.start()
        stack.push_async_callback(web.stop, 0)
        if transport in ("sse", "websocket"):
            context = authority.context() if authority else None
            url = f"{'https' if context else 'http'}://{address}/v1"
            client = httpx.AsyncClient(base_url=url, timeout=None, trust_env=False, verify=context or False)
            stub = (EventStub if transport == "sse" else SocketStub)(client, context)
            stack.push_async_callback(stub.aclose)
            yield address, web, stub
            return
        context = authority.context() if authority else None
        web_channel = WebChannel(address, text=transport == "grpc-web-text", context=context)
        stack.callback(web_channel.close)
        yield address, web_channel, web_channel.stub()


def opener(authority: Authority | None = None, *, shown: bool = True) -> Callable[[str, Any], grpc.aio.Channel]:
    """Returns a function that opens native channels. With `shown`, they present a certificate if asked for one."""
    if authority is None:
        return lambda target, options: grpc.aio.insecure_channel(target, options)
    credentials = authority.credentials(shown=shown)
    return lambda target, options: grpc.aio.secure_channel(target, credentials, options)


def open_channel(address: str, authority: Authority | None = None, *, shown: bool = True) -> grpc.aio.Channel:
    """Opens a native channel."""
    return opener(authority, shown=shown)(address, CHANNEL_OPTIONS)


async def read_until(call, phase: pb.Phase.ValueType) -> pb.Progress:
    """Reads messages until one is in `phase`, and returns it."""
    while (message := await call.read()) is not grpc.aio.EOF:
        if message.phase == phase:
            return message
    raise AssertionError(f"the stream ended before {pb.Phase.Name(phase)}")
