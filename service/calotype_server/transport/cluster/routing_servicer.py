"""Routes calls between several servers behind one address, whose load balancer sends a call to any of them.

`Watch`, `Cancel` and `Finish` go to the server that started the generation, which its id names. A list is merged from
all servers, and the cancel of a group goes to all servers. Every other call is answered by the server that receives it,
but if that server accepts no new work, `Generate` goes to another one.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc

from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer, GenerationServiceStub
from calotype_server.api.validation import validate_page
from calotype_server.errors import Draining, GroupNotFound
from calotype_server.generations.ids import tag_of
from calotype_server.transport.cluster.forwarder import abort_like, forwarded_metadata, merge_cancels, merge_pages
from calotype_server.transport.cluster.upstream import Health, Upstream
from calotype_server.transport.grpc.options import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

    from calotype.v1 import calotype_pb2 as pb

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["PeerReplicas", "RoutingServicer"]

_ANSWER_SECONDS = 5.0
"""Time for another replica to answer a unary call."""


class PeerReplicas:
    """The other servers behind the same address.

    Args:
        tag: Tag of this server, see `generations.ids`.
        list_addresses: Returns the address of the native port of each server by its tag, including this one.
    """

    def __init__(self, tag: str, list_addresses: Callable[[], Awaitable[Mapping[str, str]]]) -> None:
        self._tag = tag
        self._list_addresses = list_addresses
        self._known: dict[str, Upstream] = {}

    async def refresh(self) -> None:
        """Updates the list of servers. A removed server stays until its last call has ended."""
        addresses = dict(await self._list_addresses())
        addresses.pop(self._tag, None)
        for tag in addresses.keys() - self._known.keys():
            self._known[tag] = Upstream(addresses[tag], grpc.aio.insecure_channel, CHANNEL_OPTIONS)
        for tag in [tag for tag, each in self._known.items() if tag not in addresses and not each.active_calls]:
            await self._known.pop(tag).close()

    async def owner_of(self, generation_id: str) -> Upstream | None:
        """Returns the other server that has a generation. None if this one has it, or if no other one responds."""
        tag = tag_of(generation_id)
        if tag in ("", self._tag):
            return None
        if tag not in self._known:
            await self.refresh()
        found = self._known.get(tag)
        return found if found is not None and await _responds(found) else None

    async def responding(self) -> list[Upstream]:
        """Returns the servers that respond to a health check."""
        await self.refresh()
        known = list(self._known.values())
        responses = await asyncio.gather(*map(_responds, known))
        return [each for each, responds in zip(known, responses, strict=True) if responds]

    async def close(self) -> None:
        """Closes all channels."""
        for each in self._known.values():
            await each.close()


class RoutingServicer(GenerationServiceServicer):
    """Implements `calotype.v1.GenerationService` for all replicas together.

    Args:
        local: The servicer of this server.
        peer_replicas: The other servers.
    """

    def __init__(self, local: GenerationServiceServicer, peer_replicas: PeerReplicas) -> None:
        self._local: Any = local
        self._peer_replicas = peer_replicas

    async def Generate(  # noqa: N802 - the name in the proto
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Starts a generation here, or on another replica if this one is stopping or its engine is dead."""
        try:
            async with contextlib.aclosing(self._local.Generate(request, context)) as messages:
                async for message in messages:
                    yield message
            return
        except Draining:
            others = await self._peer_replicas.responding()
            if not others:
                raise
        target = min(others, key=lambda each: each.active_calls)
        async with contextlib.aclosing(_forward_stream("Generate", request, target, context)) as messages:
            async for message in messages:
                yield message

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.Model:
        """Describes the model, which is the same on all replicas."""
        return await self._local.GetModel(request, context)  # type: ignore[no-any-return]

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Streams a generation from the replica that has it."""
        owner = await self._peer_replicas.owner_of(request.generation_id)
        if owner is None:
            stream = self._local.Watch(request, context)
        else:
            stream = _forward_stream("Watch", request, owner, context)
        async with contextlib.aclosing(stream) as messages:
            async for message in messages:
                yield message

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Context
    ) -> pb.CancelResponse:
        """Cancels a generation on the replica that has it, or a group on all replicas that respond."""
        if request.group and not request.generation_id:
            return await self._cancel_group(request, context)
        return await self._forward_unary("Cancel", request, context)  # type: ignore[no-any-return]

    async def Finish(  # noqa: N802
        self, request: pb.FinishRequest, context: Context
    ) -> pb.FinishResponse:
        """Finishes a generation early on the replica that has it."""
        return await self._forward_unary("Finish", request, context)  # type: ignore[no-any-return]

    async def ListGenerations(  # noqa: N802
        self, request: pb.ListGenerationsRequest, context: Context
    ) -> pb.ListGenerationsResponse:
        """Merges the lists of all replicas that respond."""
        size, _ = validate_page(request)
        own = await self._local.ListGenerations(request, context)
        return merge_pages([own, *await self._ask_others("ListGenerations", request, context)], size)

    async def _cancel_group(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """Cancels the members of a group on all replicas. A replica without members only notes the cancel."""
        missing, responses = None, []
        try:
            responses.append(await self._local.Cancel(request, context))
        except GroupNotFound as error:
            missing = error
        responses += await self._ask_others("Cancel", request, context)
        if missing is not None and not responses:
            raise missing
        return merge_cancels(responses)

    async def _ask_others(self, method: str, request: Any, context: Context) -> list[Any]:
        """Makes a unary call on all other replicas, and returns the responses of those that succeed."""
        responses = []

        async def ask(replica: Upstream) -> None:
            with contextlib.suppress(grpc.aio.AioRpcError), replica.channel() as channel:
                responses.append(await _call_unary(GenerationServiceStub(channel), method, request, context))

        await asyncio.gather(*map(ask, await self._peer_replicas.responding()))
        return responses

    async def _forward_unary(self, method: str, request: Any, context: Context) -> Any:
        owner = await self._peer_replicas.owner_of(request.generation_id)
        if owner is None:
            return await getattr(self._local, method)(request, context)
        async with _stub(owner, context) as stub:
            return await _call_unary(stub, method, request, context)


async def _call_unary(stub: Any, method: str, request: Any, context: Context) -> Any:
    return await getattr(stub, method)(request, timeout=_ANSWER_SECONDS, metadata=forwarded_metadata(context))


async def _forward_stream(
    method: str, request: Any, replica: Upstream, context: Context
) -> AsyncGenerator[pb.Progress, None]:
    async with _stub(replica, context) as stub:
        call = getattr(stub, method)(request, metadata=forwarded_metadata(context))
        try:
            async for message in call:
                yield message
        finally:
            call.cancel()


@contextlib.asynccontextmanager
async def _stub(replica: Upstream, context: Context) -> AsyncIterator[Any]:
    """Yields a stub for one call on another replica. If that call fails, `context` is aborted with the same status."""
    with replica.channel() as channel:
        try:
            yield GenerationServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            await abort_like(error, context)


async def _responds(replica: Upstream) -> bool:
    await replica.probe()
    return replica.health is not Health.LOST
