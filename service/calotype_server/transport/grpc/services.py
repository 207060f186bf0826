"""The services that every gRPC port offers: generation and health."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import add_GenerationServiceServicer_to_server
from calotype_server.errors import ServiceNotFound

if TYPE_CHECKING:
    import grpc

    from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer

__all__ = ["Services"]

_SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

_CHECKED = (_SERVICE, "")
"""Names that health checks know: the service, and the whole server."""


class Services:
    """The servicers that all ports share, so that every port reports the same health.

    Args:
        servicer: Answers the calls.
    """

    names = (_SERVICE, health.SERVICE_NAME)

    def __init__(self, servicer: GenerationServiceServicer) -> None:
        self._servicer = servicer
        self._health = _Health()
        self._serving = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers all services on a server."""
        add_GenerationServiceServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    @property
    def serving(self) -> bool:
        """Whether the server accepts calls, as last set by `set_serving`."""
        return self._serving

    async def is_serving(self) -> bool:
        """Returns `serving`. Asynchronous because a bridge has to ask its upstreams for the same answer."""
        return self._serving

    async def set_serving(self, serving: bool) -> None:
        """Sets the health of the service and of the whole server."""
        self._serving = serving
        response = health_pb2.HealthCheckResponse
        for service in _CHECKED:
            await self._health.set(service, response.SERVING if serving else response.NOT_SERVING)

    def release_watchers(self) -> None:
        """Ends all health `Watch` calls, which would otherwise keep a stopping server waiting."""
        self._health.stopping.set()


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.stopping = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the name in the proto
        """Returns the health now.

        Raises:
            ServiceNotFound: There is no such service. grpcio-health would answer the same without an `ErrorInfo`.
        """
        if request.service not in _CHECKED:
            raise ServiceNotFound("The server has no such service.")
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - the name in the proto
        """Sends the health now and after every change."""
        watching = asyncio.ensure_future(super().Watch(request, context))
        stopping = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            stopping.cancel()
