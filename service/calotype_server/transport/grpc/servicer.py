"""The servicer behind every gRPC port."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer
from calotype_server.failpoints import hit
from calotype_server.transport.grpc.status import to_status
from calotype_server.transport.net.credentials import from_metadata, peer_of_call
from calotype_server.transport.net.proxies import NO_PROXIES, TrustedProxies

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import grpc.aio

    from calotype.v1 import calotype_pb2 as pb
    from calotype_server.api.service import GenerationService
    from calotype_server.auth.access import Access, Caller
    from calotype_server.errors import ServiceError

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["GenerationServicer"]


class GenerationServicer(GenerationServiceServicer):
    """Implements `calotype.v1.GenerationService`.

    Args:
        service: Carries out the calls.
        access: Identifies the caller.
        proxies: Trusted proxies, which name the callers behind them.
    """

    def __init__(self, service: GenerationService, access: Access, proxies: TrustedProxies = NO_PROXIES) -> None:
        self._service = service
        self._access = access
        self._proxies = proxies

    async def Generate(  # noqa: N802 - the name in the proto
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Starts a generation and streams it; see the proto."""
        deadline = context.time_remaining()
        async with self._service.generate(request, self._caller(context), deadline=deadline) as stream:
            async for message in stream:
                hit("grpc.message")
                yield message
        await _set_status(context, stream.failure)

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Streams a generation that was started earlier; see the proto."""
        async with self._service.watch(request, self._caller(context)) as stream:
            async for message in stream:
                hit("grpc.message")
                yield message
        await _set_status(context, stream.failure)

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Context
    ) -> pb.CancelResponse:
        """Cancels a generation; see the proto."""
        return self._service.cancel(request, self._caller(context))

    async def Finish(  # noqa: N802
        self, request: pb.FinishRequest, context: Context
    ) -> pb.FinishResponse:
        """Finishes a generation early; see the proto."""
        return self._service.finish(request, self._caller(context))

    async def ListGenerations(  # noqa: N802
        self, request: pb.ListGenerationsRequest, context: Context
    ) -> pb.ListGenerationsResponse:
        """Lists generations; see the proto."""
        return self._service.list_generations(request, self._caller(context))

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.Model:
        """Describes the model; see the proto."""
        return self._service.model()

    def _caller(self, context: Context) -> Caller:
        hit("grpc.call")
        peer = peer_of_call(context, self._proxies)
        caller = self._access.authenticate(from_metadata(context.invocation_metadata()), peer)
        structlog.contextvars.bind_contextvars(caller=caller.id)
        return caller


async def _set_status(context: Context, failure: ServiceError | None) -> None:
    """Repeats the error of the last message as the status, for clients that only look at the status."""
    if failure is not None:
        await context.abort_with_status(to_status(failure))
