"""The one servicer object behind every gRPC port."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import structlog
from grpc_status import rpc_status

from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer
from calotype_server.api import encoding
from calotype_server.transport.net.credentials import from_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import grpc.aio

    from calotype.v1 import calotype_pb2 as pb
    from calotype_server.api.service import Api, Following
    from calotype_server.auth.access import Access, Caller

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["GenerationServicer"]


class GenerationServicer(GenerationServiceServicer):
    """`calotype.v1.GenerationService`.

    Args:
        api: Does what is asked for.
        access: Who may call.
    """

    def __init__(self, api: Api, access: Access) -> None:
        self._api = api
        self._access = access

    async def Generate(  # noqa: N802 - the name in the proto
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Starts a generation and streams it; see the proto."""
        following = await self._api.generate(request, self._caller(context), deadline=context.time_remaining())
        async with contextlib.aclosing(_told(following, context)) as messages:
            async for message in messages:
                yield message

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Streams a generation that was started before; see the proto."""
        following = self._api.watch(request, self._caller(context))
        async with contextlib.aclosing(_told(following, context)) as messages:
            async for message in messages:
                yield message

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Context
    ) -> pb.CancelResponse:
        """Cancels by id; see the proto."""
        return self._api.cancel(request, self._caller(context))

    async def Finish(  # noqa: N802
        self, request: pb.FinishRequest, context: Context
    ) -> pb.FinishResponse:
        """Ends early by id; see the proto."""
        return self._api.finish(request, self._caller(context))

    async def ListGenerations(  # noqa: N802
        self, request: pb.ListGenerationsRequest, context: Context
    ) -> pb.ListGenerationsResponse:
        """Lists what the caller may see; see the proto."""
        return self._api.list_generations(request, self._caller(context))

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.Model:
        """Describes the model; see the proto."""
        return self._api.model()

    def _caller(self, context: Context) -> Caller:
        caller = self._access.authenticate(from_metadata(context.invocation_metadata()), context.peer())
        structlog.contextvars.bind_contextvars(caller=caller.id)
        return caller


async def _told(following: Following, context: Context) -> AsyncGenerator[pb.Progress, None]:
    """Yields the messages, and repeats an error at the end as the status of the call."""
    async with contextlib.aclosing(following):
        async for message in following:
            yield message
    if following.failure is not None:
        # Said in the last message already; repeated for clients that look only at the status.
        await context.abort_with_status(rpc_status.to_status(encoding.encode_error(following.failure)))
