"""Calls of a web port passed on to servers elsewhere, as bytes, so that any service passes.

Of a request that concerns one generation, the id is read, for the server that has it; the lists of several servers are
made one. Nothing else is decoded.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.validation import validate_page
from calotype_server.errors import UpstreamUnavailable
from calotype_server.transport.cluster.upstreams import Health

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from calotype_server.transport.cluster.upstreams import Upstream, Upstreams

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["Forwarder", "fail", "merge_pages", "outgoing"]

_METHOD = re.compile(r"/\w+(\.\w+)+/\w+")
_SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
_OF_ONE_GENERATION = {f"/{_SERVICE}/{name}" for name in ("Watch", "Cancel", "Finish")}
_LIST = f"/{_SERVICE}/ListGenerations"
_DETAILS = "grpc-status-details-bin"
_RETRY_SECONDS = 2.0
_LIST_SECONDS = 5.0
"""For a server to tell its part of a list."""


class Forwarder(grpc.GenericRpcHandler):
    """Answers every method with what a server answers: messages, metadata, status; deadline and cancel go with it.

    A method that answers once is a stream of one message here, which grpc-web does not tell apart. While nothing has
    been passed on, a call that a server cannot take goes to the next.

    Args:
        upstreams: The servers.
    """

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Returns a handler for every /package.Service/Method."""
        path = handler_call_details.method
        if not _METHOD.fullmatch(path):
            return None

        async def forward(request: bytes, context: Context) -> AsyncGenerator[bytes, None]:
            candidates = await self._candidates(path, request, context)
            if path == _LIST and len(candidates) > 1:
                yield await _list_all(candidates, request, context)
                return
            while True:
                upstream = candidates.pop(0)
                with upstream.channel() as channel:
                    call, begun = _call(channel, path, request, context), False
                    try:
                        if initial := _returning(await call.initial_metadata()):
                            begun = True
                            await context.send_initial_metadata(initial)
                        message = await call.read()
                        if not begun:
                            begun = True
                            await context.send_initial_metadata(())
                        while message is not grpc.aio.EOF:
                            yield message
                            message = await call.read()
                        context.set_trailing_metadata(_returning(await call.trailing_metadata()))
                        return
                    except grpc.aio.AioRpcError as error:
                        if _is_broken(error):
                            upstream.health = Health.LOST
                        if begun or not candidates or error.code() not in _ANOTHER_MAY:
                            await fail(error, context)
                    finally:
                        call.cancel()

        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(forward)
        return handler

    async def _candidates(self, path: str, request: bytes, context: Context) -> list[Upstream]:
        """Returns the servers that may answer, the likeliest first."""
        if path in _OF_ONE_GENERATION:
            metadata = outgoing(context.invocation_metadata())
            if (home := await self._upstreams.home(_generation_id(request), metadata)) is not None:
                return [home]
        # Where it is gone, any server knows how to say so.
        if not (candidates := self._upstreams.by_health()):
            raise _unavailable()
        return candidates


def merge_pages(pages: Sequence[pb.ListGenerationsResponse], size: int) -> pb.ListGenerationsResponse:
    """Makes one page of those of several servers, all cut at the same moment: the newest `size` of them all."""
    known = [summary for page in pages for summary in page.generations]
    known.sort(key=lambda summary: -summary.create_time.ToNanoseconds())
    merged = pb.ListGenerationsResponse(generations=known[:size])
    if len(known) > size or any(page.next_page_token for page in pages):
        merged.next_page_token = str(merged.generations[-1].create_time.ToNanoseconds())
    return merged


async def _list_all(upstreams: Sequence[Upstream], request: bytes, context: Context) -> bytes:
    """Asks all for the same page; those that cannot be reached have nothing to tell."""
    deadline = context.time_remaining()
    limit = _LIST_SECONDS if deadline is None else min(deadline, _LIST_SECONDS)

    async def ask(upstream: Upstream) -> bytes | grpc.aio.AioRpcError:
        with upstream.channel() as channel:
            try:
                answer: bytes = await _call(channel, _LIST, request, context, limit).read()
            except grpc.aio.AioRpcError as error:
                return error
            return answer

    answers = await asyncio.gather(*(ask(each) for each in upstreams if each.health is not Health.LOST))
    pages = [pb.ListGenerationsResponse.FromString(each) for each in answers if isinstance(each, bytes)]
    if not pages:
        failed = next((each for each in answers if isinstance(each, grpc.aio.AioRpcError)), None)
        if failed is None:
            raise _unavailable()
        await fail(failed, context)
    size, _ = validate_page(pb.ListGenerationsRequest.FromString(request))
    return merge_pages(pages, size).SerializeToString()


def _call(channel: grpc.aio.Channel, path: str, request: bytes, context: Context, timeout: float | None = None) -> Any:
    method: Any = channel.unary_stream(path)
    timeout = context.time_remaining() if timeout is None else timeout
    return method(request, timeout=timeout, metadata=outgoing(context.invocation_metadata()))


def _generation_id(request: bytes) -> str:
    """Reads the id that a request begins with; empty when it is none, which the server then says."""
    try:
        return pb.CancelRequest.FromString(request).generation_id
    except DecodeError:
        return ""


_ANOTHER_MAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


def _is_broken(error: grpc.aio.AioRpcError) -> bool:
    """Whether the connection failed, rather than the server having said so."""
    details = any(key == _DETAILS for key, _ in error.trailing_metadata() or ())
    # A proxy resets a call whose server is gone, which gRPC takes for a cancel.
    is_reset = error.code() is grpc.StatusCode.CANCELLED and "RST_STREAM" in (error.details() or "")
    return is_reset or (error.code() is grpc.StatusCode.UNAVAILABLE and not details)


def _unavailable() -> UpstreamUnavailable:
    return UpstreamUnavailable("The server behind this bridge cannot be reached.", retry_after=_RETRY_SECONDS)


async def fail(error: grpc.aio.AioRpcError, context: Context) -> None:
    """Ends a call as the one that was made for it has ended."""
    if _is_broken(error):
        # gRPC's own words for a connection that failed: addresses and system errors, which are not the caller's.
        raise _unavailable() from None
    await context.abort(error.code(), error.details() or "", tuple(_returning(error.trailing_metadata())))


def outgoing(metadata: Any) -> list[tuple[str, Any]]:
    """Returns what of a call's metadata goes with the call that is made for it."""
    # gRPC names itself, and refuses to be named by others.
    return [(key, value) for key, value in metadata if key != "user-agent"]


def _returning(metadata: Any) -> list[tuple[str, Any]]:
    """Returns what the upstream said, without what gRPC says of the connection to it."""
    return [(key, value) for key, value in metadata or () if key == _DETAILS or not key.startswith("grpc-")]
