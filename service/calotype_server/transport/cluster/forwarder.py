"""Forwards the calls of a bridge to its upstream servers, as bytes, so that any service works.

It decodes only three things: the generation id of `Watch`, `Cancel` and `Finish`, to find the server that has the
generation; the group of `Cancel`, which goes to all servers; and the answers of several servers, to merge them.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api import encoding
from calotype_server.api.validation import validate_page
from calotype_server.errors import UpstreamUnavailable
from calotype_server.transport.cluster.upstream import Health
from calotype_server.transport.net.credentials import peer_of_call
from calotype_server.transport.net.peers import host_of
from calotype_server.transport.net.proxies import FORWARDED_FOR

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Sequence

    from calotype_server.transport.cluster.upstream import Upstream
    from calotype_server.transport.cluster.upstreams import Upstreams

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["Forwarder", "abort_like", "forwarded_metadata", "merge_cancels", "merge_pages"]

_METHOD = re.compile(r"/\w+(\.\w+)+/\w+")
_SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
_BY_GENERATION = {f"/{_SERVICE}/{name}" for name in ("Watch", "Cancel", "Finish")}
"""Methods that only the server with the generation can answer."""

_LIST = f"/{_SERVICE}/ListGenerations"
_CANCEL = f"/{_SERVICE}/Cancel"
_DETAILS = "grpc-status-details-bin"
_RETRY_SECONDS = 2.0
_ANSWER_SECONDS = 5.0
"""Time for an upstream to answer a call that goes to all of them."""

_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Statuses after which another upstream may accept the call."""


class Forwarder(grpc.GenericRpcHandler):
    """Answers every method with the messages, metadata and status of an upstream; passes on deadlines and cancels.

    It handles a unary method as a stream of one message, which looks the same in grpc-web. As long as it has passed
    nothing on, it retries a call that an upstream cannot accept with the next one. If none accepts the call, the client
    gets the last answer of a server that can be reached, such as NOT_READY.

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
            if path == _CANCEL and len(candidates) > 1 and _cancelled(request).group:
                yield await _cancel_group(candidates, request, context)
                return
            answer: grpc.aio.AioRpcError | None = None  # of a server that cannot accept the call
            while True:
                upstream = candidates.pop(0)
                with upstream.channel() as channel:
                    call, started = _call(channel, path, request, context), False
                    try:
                        if initial := _returned_metadata(await call.initial_metadata()):
                            started = True
                            await context.send_initial_metadata(initial)
                        message = await call.read()
                        if not started:
                            started = True
                            await context.send_initial_metadata(())
                        while message is not grpc.aio.EOF:
                            yield message
                            message = await call.read()
                        context.set_trailing_metadata(_returned_metadata(await call.trailing_metadata()))
                        return
                    except grpc.aio.AioRpcError as error:
                        lost = _is_connection_error(error)
                        if lost:
                            upstream.health = Health.LOST
                        else:
                            answer = error
                        if started or not candidates or not (lost or error.code() in _RETRYABLE):
                            await abort_like(error if started else answer or error, context)
                    finally:
                        call.cancel()

        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(forward)
        return handler

    async def _candidates(self, path: str, request: bytes, context: Context) -> list[Upstream]:
        """Returns the servers that may answer, best first."""
        if path in _BY_GENERATION:
            metadata = _bridged_metadata(context)
            if (owner := await self._upstreams.owner_of(_cancelled(request).generation_id, metadata)) is not None:
                return [owner]
        # If the owner is gone, any server returns the right error.
        if not (candidates := self._upstreams.by_health()):
            raise _unavailable()
        return candidates


def merge_pages(pages: Sequence[pb.ListGenerationsResponse], size: int) -> pb.ListGenerationsResponse:
    """Merges pages of several servers that end before the same time into one page of the newest `size` entries."""
    known = [summary for page in pages for summary in page.generations]
    known.sort(key=lambda summary: -summary.create_time.ToNanoseconds())
    merged = pb.ListGenerationsResponse(generations=known[:size])
    if len(known) > size or any(page.next_page_token for page in pages):
        merged.next_page_token = str(merged.generations[-1].create_time.ToNanoseconds())
    return merged


def merge_cancels(responses: Iterable[pb.CancelResponse]) -> pb.CancelResponse:
    """Merges the responses of several servers that have members of the same group."""
    return pb.CancelResponse(cancelled_count=sum(each.cancelled_count for each in responses))


async def _list_all(upstreams: Sequence[Upstream], request: bytes, context: Context) -> bytes:
    """Requests the same page from all servers and merges the results."""
    pages = [pb.ListGenerationsResponse.FromString(each) for each in await _ask_all(upstreams, _LIST, request, context)]
    size, _ = validate_page(pb.ListGenerationsRequest.FromString(request))
    return merge_pages(pages, size).SerializeToString()


async def _cancel_group(upstreams: Sequence[Upstream], request: bytes, context: Context) -> bytes:
    """Cancels the members of a group on all servers. A server without members only notes the cancel."""
    answers = await _ask_all(upstreams, _CANCEL, request, context)
    return merge_cancels(map(pb.CancelResponse.FromString, answers)).SerializeToString()


async def _ask_all(upstreams: Sequence[Upstream], path: str, request: bytes, context: Context) -> list[bytes]:
    """Makes the same unary call on all servers and returns their responses.

    Leaves out servers that fail. If all of them fail, the call is aborted with the most informative status.
    """
    deadline = context.time_remaining()
    seconds = _ANSWER_SECONDS if deadline is None else min(deadline, _ANSWER_SECONDS)

    async def ask(upstream: Upstream) -> bytes | grpc.aio.AioRpcError:
        with upstream.channel() as channel:
            try:
                answer: bytes = await _call(channel, path, request, context, seconds).read()
            except grpc.aio.AioRpcError as error:
                return error
            return answer

    results = await asyncio.gather(*(ask(each) for each in upstreams if each.health is not Health.LOST))
    if not (answers := [each for each in results if isinstance(each, bytes)]):
        failures = [each for each in results if isinstance(each, grpc.aio.AioRpcError)]
        if not failures:
            raise _unavailable()
        await abort_like(min(failures, key=_vagueness), context)
    return answers


def _call(channel: grpc.aio.Channel, path: str, request: bytes, context: Context, timeout: float | None = None) -> Any:
    method: Any = channel.unary_stream(path)
    timeout = context.time_remaining() if timeout is None else timeout
    return method(request, timeout=timeout, metadata=_bridged_metadata(context))


def _bridged_metadata(context: Context) -> list[tuple[str, Any]]:
    """Returns the metadata of a call with the address of its client, for servers that trust this bridge.

    An address that the client itself has sent is dropped: it could be false.
    """
    metadata = [(key, value) for key, value in forwarded_metadata(context) if key != FORWARDED_FOR]
    return [*metadata, (FORWARDED_FOR, host_of(peer_of_call(context)) or "unknown")]


def _cancelled(request: bytes) -> pb.CancelRequest:
    """Returns a request for one generation, whose first field is its id; empty if a server has to reject it."""
    try:
        return pb.CancelRequest.FromString(request)
    except DecodeError:
        return pb.CancelRequest()


def _is_connection_error(error: grpc.aio.AioRpcError) -> bool:
    """Whether the connection failed, as opposed to a status that the server sent."""
    # A proxy resets a call whose server is gone, and a stopping server cancels a call that arrives in that moment. Our
    # own cancels never end up here, and those of a server have details.
    lost = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    return error.code() in lost and not _has_details(error)


def _vagueness(error: grpc.aio.AioRpcError) -> tuple[bool, bool]:
    """Orders errors of several servers: a permanent one says more than one that a retry may change."""
    return _is_connection_error(error), error.code() in _RETRYABLE


def _has_details(error: grpc.aio.AioRpcError) -> bool:
    return any(key == _DETAILS for key, _ in error.trailing_metadata() or ())


def _unavailable() -> UpstreamUnavailable:
    return UpstreamUnavailable("The server behind this bridge cannot be reached.", retry_after=_RETRY_SECONDS)


async def abort_like(error: grpc.aio.AioRpcError, context: Context) -> None:
    """Aborts a call with the status of the call that was made on its behalf.

    Raises:
        UpstreamUnavailable: The connection failed. gRPC's own text would reveal addresses and system errors.
        grpc.aio.AbortError: In all other cases. A status without details, which comes from gRPC itself, gets an
            `ErrorInfo` with the name of its code as the reason.
    """
    if _is_connection_error(error):
        raise _unavailable() from None
    metadata = _returned_metadata(error.trailing_metadata())
    if not _has_details(error):
        details = encoding.encode_status(error.code().name, error.code().name, error.details() or "")
        metadata.append((_DETAILS, details.SerializeToString()))
    await context.abort(error.code(), error.details() or "", tuple(metadata))


def forwarded_metadata(context: Context) -> list[tuple[str, Any]]:
    """Returns the metadata of a call for the call that is made on its behalf."""
    # gRPC sets its own user-agent and rejects another one.
    return [(key, value) for key, value in context.invocation_metadata() or () if key != "user-agent"]


def _returned_metadata(metadata: Any) -> list[tuple[str, Any]]:
    """Returns the upstream's metadata, without the entries that describe our connection to it."""
    return [(key, value) for key, value in metadata or () if key == _DETAILS or not key.startswith("grpc-")]
