"""Calotype on Ray Serve: each replica runs an engine and the servicer of a plain server behind Serve's ingress.

`service/ray.yaml` sets the number of replicas, `service/ray.env` the environment in which Ray must be started, and
`service/README.md` describes the operation. Each replica reads its settings from `CALOTYPE_...` variables, like
`calotype serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import add_GenerationServiceServicer_to_server
from calotype_server.api.service import GenerationService
from calotype_server.apps.health import HealthReporter
from calotype_server.apps.instruments import Instruments
from calotype_server.apps.loading import load_engine
from calotype_server.apps.runtime import FINAL_MESSAGE_GRACE_SECONDS, Runtime
from calotype_server.auth.access import Access, Caller
from calotype_server.errors import EngineDead, StartupError
from calotype_server.file_watcher import FileWatcher
from calotype_server.generations.store import Store
from calotype_server.observability.logs import configure_logging
from calotype_server.settings import Settings
from calotype_server.transport.cluster.ray_adapter import HandlerRegistry, RayServicer, rpc_methods
from calotype_server.transport.cluster.routing_servicer import PeerReplicas, RoutingServicer
from calotype_server.transport.grpc.interceptors import interceptors
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.servicer import GenerationServicer
from calotype_server.transport.grpc.services import Services

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

__all__ = ["Directory", "Replica", "app"]

_REQUIRED_ENVIRONMENT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Without these, Ray loses cancels and statuses, and slow readers do not slow the sender down."""

_FORGET_SECONDS = 60.0
"""A replica that has not registered for this long is forgotten."""


class Directory:
    """Ray actor that maps replica tags to addresses.

    It holds soft state only: replicas register again every few seconds, so it can be lost safely.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, tuple[str, float]] = {}

    def register(self, tag: str, address: str) -> dict[str, str]:
        """Registers a replica, and returns the addresses of all replicas by tag."""
        now = time.monotonic()
        self._replicas[tag] = address, now
        self._replicas = {tag: each for tag, each in self._replicas.items() if now - each[1] < _FORGET_SECONDS}
        return {tag: address for tag, (address, _) in self._replicas.items()}


class _SharedAccess(Access):
    """Access control behind the ingress, where all calls come from one host.

    Without keys, all callers are therefore the same caller.
    """

    def authenticate(self, authorization: str | None, peer: str) -> Caller:
        """Returns the caller; see `Access.authenticate`."""
        return super().authenticate(authorization, "ray:0")


@rpc_methods(pb.DESCRIPTOR.services_by_name["GenerationService"])
class Replica(RayServicer):
    """One engine. Serve calls a method for each RPC, `check_health`, and `__del__` after it has drained the ingress.

    Each replica also has a native gRPC port for the other replicas; see `transport.cluster.routing_servicer`.
    """

    load = staticmethod(load_engine)

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        wrong = {name for name, value in _REQUIRED_ENVIRONMENT.items() if os.environ.get(name) != value}
        if wrong:
            raise StartupError(f"Start Ray with the variables of service/ray.env: {', '.join(sorted(wrong))}.")
        from_environment: dict[str, Any] = {}
        settings = Settings(**from_environment)
        configure_logging(settings.log_level, settings.log_format, prompts=settings.log_prompts)
        access = _SharedAccess(settings.api_keys)
        service = GenerationService(settings.limits)
        servicer = GenerationServicer(service, access)
        self._services = Services(servicer)
        self._stack = stack = contextlib.AsyncExitStack()
        instruments = await stack.enter_async_context(Instruments(settings.tracing))
        store = await stack.enter_async_context(Store.opened(settings.state, settings.state_timeout_seconds))
        engine = await self.load(settings, instruments.observe)
        self._runtime = Runtime(
            settings, engine, service=service, instruments=instruments, store=store, on_stall=self._end_stalled
        )
        self._native = NativeServer(self._services, access, limits=settings.port_limits)
        await self._runtime.__aenter__()
        host: str = ray.util.get_node_ip_address()
        address = await self._native.start(f"[{host}]:0" if ":" in host else f"{host}:0")
        tag = self._runtime.generations.replica
        self._peer_replicas = PeerReplicas(tag, _registration(tag, address))
        self.handlers = HandlerRegistry(interceptors(access, "ray", instruments.observe))
        registry: Any = self.handlers
        add_GenerationServiceServicer_to_server(RoutingServicer(servicer, self._peer_replicas), registry)
        self._rejecting = asyncio.create_task(self._reject_when_dead())
        watcher = FileWatcher(access.files, access.reload)
        stack.push_async_callback(watcher.stop)
        watcher.start()
        self._health = contextlib.AsyncExitStack()
        await self._health.enter_async_context(
            HealthReporter(self._runtime.problems, self._services.set_serving).running()
        )
        await self._peer_replicas.refresh()

    async def check_health(self) -> None:
        """Raises when only a new process helps. Serve then replaces this replica.

        Raises:
            EngineDead: The engine cannot continue.
        """
        if self._runtime.dead.is_set():
            raise EngineDead("The engine cannot continue.")
        await self._peer_replicas.refresh()

    async def _reject_when_dead(self) -> None:
        """Rejects new work until Serve replaces this replica.

        The ingress prefers idle replicas, so it would otherwise keep choosing this dead one.
        """
        await self._runtime.dead.wait()
        self._runtime.generations.reject_new(FINAL_MESSAGE_GRACE_SECONDS)

    async def _end_stalled(self, end_generations: Callable[[], Awaitable[None]]) -> None:
        """Ends all generations, and gives readers behind the ingress time to receive their last message."""
        await end_generations()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._runtime.generations.idle(), FINAL_MESSAGE_GRACE_SECONDS)

    async def __del__(self) -> None:
        """Ends generations without readers behind the ingress: kept ones, and those that other replicas read."""
        self._rejecting.cancel()
        await self._health.aclose()
        await self._runtime.__aexit__(None, None, None)
        self._services.release_watchers()
        await self._native.stop(FINAL_MESSAGE_GRACE_SECONDS)
        await self._peer_replicas.close()
        await self._stack.aclose()


def _registration(tag: str, address: str) -> Callable[[], Awaitable[Mapping[str, str]]]:
    """Returns a function that registers a replica with the directory, and returns the addresses of all replicas."""
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Directory)
    name = f"calotype-{serve.get_replica_context().app_name}"
    directory = actor.options(name=name, namespace="calotype", lifetime="detached", get_if_exists=True).remote()

    async def register() -> Mapping[str, str]:
        addresses: Mapping[str, str] = await directory.register.remote(tag, address)
        return addresses

    return register


app = serve.deployment(name="Calotype")(Replica).bind()
