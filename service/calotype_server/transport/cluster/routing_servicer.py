"""Several servers behind one address that tells nobody which of them answers: they pass calls on among themselves.

`Watch`, `Cancel` and `Finish` are for the server that has begun the generation, which its id names; a list is that of
all. Everything else is answered here; but when this server takes no more, others begin what is asked of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc

from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer, GenerationServiceStub
from calotype_server.api.validation import validate_page
from calotype_server.errors import NotReady
from calotype_server.generations.ids import tag_of
from calotype_server.transport.cluster.forwarder import fail, merge_pages, outgoing
from calotype_server.transport.cluster.upstreams import CHANNEL_OPTIONS, Health, Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

    from calotype.v1 import calotype_pb2 as pb

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["PeerReplicas", "RoutingServicer"]

_ANSWER_SECONDS = 5.0
"""For a sibling to answer what is asked at once."""


class PeerReplicas:
    """The other servers.

    Args:
        tag: Of this server.
        ask: Returns the address of the native port of each server by its tag, this one included.
    """

    def __init__(self, tag: str, ask: Callable[[], Awaitable[Mapping[str, str]]]) -> None:
        self._tag = tag
        self._ask = ask
        self._known: dict[str, Upstream] = {}

    async def refresh(self) -> None:
        """Asks who is there. Those who are gone are forgotten when their last call has ended."""
        addresses = dict(await self._ask())
        addresses.pop(self._tag, None)
        for tag in addresses.keys() - self._known.keys():
            self._known[tag] = Upstream(addresses[tag], grpc.aio.insecure_channel, CHANNEL_OPTIONS)
        for tag in [tag for tag, each in self._known.items() if tag not in addresses and not each.streams]:
            await self._known.pop(tag).close()

    async def home(self, generation_id: str) -> Upstream | None:
        """Returns the sibling that has begun a generation. None when it is this server, or none, or does not answer."""
        tag = tag_of(generation_id)
        if tag in ("", self._tag):
            return None
        if tag not in self._known:
            await self.refresh()
        found = self._known.get(tag)
        return found if found is not None and await _answers(found) else None

    async def all(self) -> list[Upstream]:
        """Returns those that answer."""
        await self.refresh()
        known = list(self._known.values())
        answers = await asyncio.gather(*map(_answers, known))
        return [each for each, answering in zip(known, answers, strict=True) if answering]

    async def close(self) -> None:
        """Closes all channels."""
        for each in self._known.values():
            await each.close()


class RoutingServicer(GenerationServiceServicer):
    """`calotype.v1.GenerationService` of all siblings.

    Args:
        own: Answers for this server.
        siblings: The others.
    """

    def __init__(self, own: GenerationServiceServicer, siblings: PeerReplicas) -> None:
        self._own: Any = own
        self._siblings = siblings

    async def Generate(  # noqa: N802 - the name in the proto
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Starts a generation; see the proto. Here, but for a server that stops, or whose engine is dead."""
        try:
            async with contextlib.aclosing(self._own.Generate(request, context)) as messages:
                async for message in messages:
                    yield message
            return
        except NotReady:
            others = await self._siblings.all()
            if not others:
                raise
        home = min(others, key=lambda each: each.streams)
        async with contextlib.aclosing(_passed_on("Generate", request, home, context)) as messages:
            async for message in messages:
                yield message

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.Model:
        """Describes the model, which all have; see the proto."""
        return await self._own.GetModel(request, context)  # type: ignore[no-any-return]

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Streams a generation that was started before; see the proto."""
        home = await self._siblings.home(request.generation_id)
        stream = self._own.Watch(request, context) if home is None else _passed_on("Watch", request, home, context)
        async with contextlib.aclosing(stream) as messages:
            async for message in messages:
                yield message

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Context
    ) -> pb.CancelResponse:
        """Cancels by id; see the proto."""
        return await self._once("Cancel", request, context)  # type: ignore[no-any-return]

    async def Finish(  # noqa: N802
        self, request: pb.FinishRequest, context: Context
    ) -> pb.FinishResponse:
        """Ends early by id; see the proto."""
        return await self._once("Finish", request, context)  # type: ignore[no-any-return]

    async def ListGenerations(  # noqa: N802
        self, request: pb.ListGenerationsRequest, context: Context
    ) -> pb.ListGenerationsResponse:
        """Lists what the caller may see, of all that answer; see the proto."""
        size, _ = validate_page(request)
        pages = [await self._own.ListGenerations(request, context)]

        async def ask(sibling: Upstream) -> None:
            with contextlib.suppress(grpc.aio.AioRpcError), sibling.channel() as channel:
                stub: Any = GenerationServiceStub(channel)
                how = {"timeout": _ANSWER_SECONDS, "metadata": outgoing(context.invocation_metadata())}
                pages.append(await stub.ListGenerations(request, **how))

        await asyncio.gather(*map(ask, await self._siblings.all()))
        return merge_pages(pages, size)

    async def _once(self, method: str, request: Any, context: Context) -> Any:
        home = await self._siblings.home(request.generation_id)
        if home is None:
            return await getattr(self._own, method)(request, context)
        async with _at(home, context) as stub:
            how = {"timeout": _ANSWER_SECONDS, "metadata": outgoing(context.invocation_metadata())}
            return await getattr(stub, method)(request, **how)


async def _passed_on(
    method: str, request: Any, sibling: Upstream, context: Context
) -> AsyncGenerator[pb.Progress, None]:
    async with _at(sibling, context) as stub:
        call = getattr(stub, method)(request, metadata=outgoing(context.invocation_metadata()))
        try:
            async for message in call:
                yield message
        finally:
            call.cancel()


@contextlib.asynccontextmanager
async def _at(sibling: Upstream, context: Context) -> AsyncIterator[Any]:
    """Lends a stub; an error of its calls becomes that of the call that they are made for."""
    with sibling.channel() as channel:
        try:
            yield GenerationServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            await fail(error, context)


async def _answers(sibling: Upstream) -> bool:
    await sibling.probe()
    return sibling.health is not Health.LOST
