"""Calotype on Ray Serve: in each replica the engine and the servicer of a plain server, behind the ingress of Serve.

`service/ray.yaml` says how many, `service/ray.env` what Ray has to be started with, service/README.md what to know.
Each replica reads its settings from CALOTYPE_... variables, as `calotype serve` does.
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
from calotype_server.apps.runtime import FINAL_MESSAGE_GRACE_SECONDS, Core
from calotype_server.auth.access import Access, Caller
from calotype_server.errors import EngineDead, StartupError
from calotype_server.file_watcher import FileWatcher
from calotype_server.observability.logs import configure_logging
from calotype_server.settings import Settings
from calotype_server.transport.cluster.ray_adapter import HandlerRegistry, RayServicer, rpc_methods
from calotype_server.transport.cluster.routing_servicer import PeerReplicas, RoutingServicer
from calotype_server.transport.grpc.interceptors import interceptors
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.servicer import GenerationServicer
from calotype_server.transport.grpc.services import Services

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

__all__ = ["Directory", "Replica", "app"]

_MODE = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Otherwise Ray loses cancels and statuses, and readers who stall do not slow anything down."""

_FORGET_SECONDS = 60.0
"""After which a replica that does not tell its address counts as gone."""


class Directory:
    """The address of each replica, for the others. An actor, in which nothing is that replicas would not tell again."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, float]] = {}

    def tell(self, tag: str, address: str) -> dict[str, str]:
        """Notes the address of one, and returns those of all by their tags."""
        now = time.monotonic()
        self._told[tag] = address, now
        self._told = {tag: each for tag, each in self._told.items() if now - each[1] < _FORGET_SECONDS}
        return {tag: address for tag, (address, _) in self._told.items()}


class _SharedAccess(Access):
    """Behind the ingress all calls come from one host: without a key, everybody is the same caller on each replica."""

    def authenticate(self, authorization: str | None, peer: str) -> Caller:
        """Returns whose call it is, see `Access.admit`."""
        return super().authenticate(authorization, "ray:0")


@rpc_methods(pb.DESCRIPTOR.services_by_name["GenerationService"])
class Replica(RayServicer):
    """One engine. Serve calls a method for each RPC, `check_health`, and `__del__` when it has drained the ingress.

    Besides it has a native port, for the other replicas alone, see `transport.siblings`.
    """

    async def __init__(self) -> None:  # type: ignore[misc]  # which Serve awaits
        wrong = {name for name, value in _MODE.items() if os.environ.get(name) != value}
        if wrong:
            raise StartupError(f"Start Ray with the variables of service/ray.env: {', '.join(sorted(wrong))}.")
        given: dict[str, Any] = {}  # but for the environment
        settings = Settings(**given)
        configure_logging(settings.log_level, settings.log_format, prompts=settings.log_prompts)
        access = _SharedAccess(settings.api_keys)
        self._watched = FileWatcher(access.files, access.reload)
        self._core = core = Core(settings)
        await core.load()
        await core.warm_up()
        servicer = GenerationServicer(core.api, access)
        self._services = Services(servicer)
        self._native = NativeServer(self._services, access, limits=settings.port_limits)
        host: str = ray.util.get_node_ip_address()
        address = await self._native.start(f"[{host}]:0" if ":" in host else f"{host}:0")
        directory: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Directory)
        name = f"calotype-{serve.get_replica_context().app_name}"
        self._directory = directory.options(
            name=name, namespace="calotype", lifetime="detached", get_if_exists=True
        ).remote()
        tag = core.generations.replica

        async def ask() -> Mapping[str, str]:
            addresses: Mapping[str, str] = await self._directory.tell.remote(tag, address)
            return addresses

        self._siblings = PeerReplicas(tag, ask)
        self.handlers = HandlerRegistry(interceptors(access, "ray", core.observe))
        registry: Any = self.handlers
        add_GenerationServiceServicer_to_server(RoutingServicer(servicer, self._siblings), registry)
        core.watch(self._farewell)
        self._dying = asyncio.create_task(self._refuse_when_dead())
        await core.open()
        self._watched.start()
        await self._services.set_serving(True)
        await self._siblings.refresh()

    async def check_health(self) -> None:
        """Raises when only a new process helps; Serve then replaces this one."""
        if self._core.dead.is_set():
            raise EngineDead("The engine cannot go on.")
        await self._siblings.refresh()

    async def _refuse_when_dead(self) -> None:
        """Leaves what comes until then to siblings: the ingress likes best who has least to do."""
        await self._core.dead.wait()
        self._core.generations.refuse(FINAL_MESSAGE_GRACE_SECONDS)

    async def _farewell(self, ending: Coroutine[object, object, None]) -> None:
        """Lets readers hear of a stall, those at the ingress as well."""
        await ending
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._core.generations.idle(), FINAL_MESSAGE_GRACE_SECONDS)

    async def __del__(self) -> None:
        """Ends what nobody reads through the ingress: generations that are kept, readers who come by way of others."""
        self._dying.cancel()
        await self._services.set_serving(False)
        await self._core.drain(_patiently)
        self._services.release_watchers()
        await self._native.stop(FINAL_MESSAGE_GRACE_SECONDS)
        await self._siblings.close()
        await self._watched.stop()
        await self._core.close()


async def _patiently(work: Coroutine[object, object, None]) -> None:
    await work


app = serve.deployment(name="Calotype")(Replica).bind()
