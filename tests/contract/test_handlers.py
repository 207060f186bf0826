"""Statuses, metadata, deadlines and cancels work in the same way over every port."""

from __future__ import annotations

import asyncio
import itertools

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from support.lab import PATIENCE, lab, writer


async def ends_with(call, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    """Reads a call to its end and returns its error, which must have this status code."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert caught.value.code() is code
    return caught.value


def after(messages: int, then):
    """Returns a handler that streams some messages and then awaits `then`."""

    async def handler(request, context):
        for number in range(messages):
            yield b"%d" % number
        await then(context)

    return handler


async def test_a_unary_call_is_answered(grpc_transport: str) -> None:
    """The answer arrives with the trailers that the handler set."""

    async def echo(request, context):
        context.set_trailing_metadata((("x-trailer", "value"),))
        return request[::-1]

    async with lab(grpc_transport, {"Echo": echo}) as server:
        call = server.stream("Echo", b"abc") if grpc_transport == "native" else server.unary("Echo", b"abc")
        assert await call.read() == b"cba"
        assert await call.read() is grpc.aio.EOF
        assert dict(await call.trailing_metadata())["x-trailer"] == "value"


async def test_a_stream_without_messages_is_ok(grpc_transport: str) -> None:
    """A handler may end without yielding a message."""

    async def nothing(request, context):
        return
        yield

    async with lab(grpc_transport, {"Nothing": nothing}) as server:
        assert [message async for message in server.stream("Nothing")] == []


@pytest.mark.parametrize("messages", [0, 2])
async def test_set_code_and_set_details_decide_the_status(grpc_transport: str, messages: int) -> None:
    """They work before and after the first message, and with non-ASCII details."""

    async def then(context):
        context.set_code(grpc.StatusCode.DATA_LOSS)
        context.set_details("50 % größer\nals erlaubt")

    async with lab(grpc_transport, {"Set": after(messages, then)}) as server:
        error = await ends_with(server.stream("Set"), grpc.StatusCode.DATA_LOSS)
    assert error.details() == "50 % größer\nals erlaubt"


@pytest.mark.parametrize("messages", [0, 2])
async def test_abort_with_trailing_metadata(grpc_transport: str, messages: int) -> None:
    """Text and binary metadata arrive with the status, with and without messages before it."""

    async def then(context):
        trailing = (("x-trailer", "value"), ("x-some-bin", b"\x00\xff"))
        await context.abort(grpc.StatusCode.ABORTED, "why", trailing)

    async with lab(grpc_transport, {"Abort": after(messages, then)}) as server:
        error = await ends_with(server.stream("Abort"), grpc.StatusCode.ABORTED)
    found = dict(error.trailing_metadata())
    assert (error.details(), found["x-trailer"], found["x-some-bin"]) == ("why", "value", b"\x00\xff")


async def test_abort_with_only_a_code(grpc_transport: str) -> None:
    """The details are empty by default."""

    async def abort(request, context):
        await context.abort(grpc.StatusCode.OUT_OF_RANGE)

    async with lab(grpc_transport, {"Abort": abort}) as server:
        assert (await ends_with(server.stream("Abort"), grpc.StatusCode.OUT_OF_RANGE)).details() == ""


@pytest.mark.parametrize("messages", [0, 2])
async def test_rich_errors(grpc_transport: str, messages: int) -> None:
    """`abort_with_status` sends typed details, before and after the first message."""
    packed = Any()
    packed.Pack(RetryInfo())
    status = Status(code=8, message="full", details=[packed])

    async def then(context):
        await context.abort_with_status(rpc_status.to_status(status))

    async with lab(grpc_transport, {"Rich": after(messages, then)}) as server:
        error = await ends_with(server.stream("Rich"), grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert rpc_status.from_call(error) == status


@pytest.mark.parametrize("messages", [0, 2])
async def test_an_exception_is_an_internal_error_without_its_text(grpc_transport: str, messages: int) -> None:
    """The status has an ErrorInfo and hides the text of the exception, before and after the first message."""

    async def then(context):
        raise ValueError("secret")

    async with lab(grpc_transport, {"Raise": after(messages, then)}) as server:
        error = await ends_with(server.stream("Raise"), grpc.StatusCode.INTERNAL)
    assert "secret" not in error.details()
    assert rpc_status.from_call(error).details[0].Is(ErrorInfo.DESCRIPTOR)


async def test_initial_metadata_arrives_before_the_first_message(grpc_transport: str) -> None:
    """The client receives initial metadata while the handler is still running."""
    proceed = asyncio.Event()

    async def handler(request, context):
        await context.send_initial_metadata((("x-early", "yes"), ("x-early-bin", b"\x01")))
        await proceed.wait()
        yield b"late"

    async with lab(grpc_transport, {"Early": handler}) as server:
        call = server.stream("Early")
        assert dict(await call.initial_metadata())["x-early"] == "yes"
        proceed.set()
        assert await call.read() == b"late"


async def test_a_handler_may_write_instead_of_yielding(grpc_transport: str) -> None:
    """The style of `context.write`, which the health service uses, works on every port."""

    @writer
    async def handler(request, context):
        for number in range(3):
            await context.write(b"%d" % number)

    async with lab(grpc_transport, {"Write": handler}) as server:
        assert [message async for message in server.stream("Write")] == [b"0", b"1", b"2"]


async def test_metadata_reaches_the_handler(grpc_transport: str) -> None:
    """The handler receives text and binary metadata."""
    seen = {}

    async def handler(request, context):
        seen["metadata"] = [(key, value) for key, value in context.invocation_metadata() if key in dict(given)]
        return b""

    given = (("x-text", "a b"), ("x-some-bin", b"\x00\x01\x02\x03"))
    encoded = (("x-text", "a b"), ("x-some-bin", "AAECAw"))
    async with lab(grpc_transport, {"Metadata": handler}) as server:
        await server.unary("Metadata", metadata=given if grpc_transport == "native" else encoded)
    assert sorted(seen["metadata"]) == sorted(given)


async def test_the_context_behaves_like_that_of_grpc_aio(grpc_transport: str) -> None:
    """Its methods return the same values on every port."""
    seen = {}

    async def handler(request, context):
        seen["peer"] = context.peer().startswith("ipv4:127.0.0.1:")
        seen["identities"] = (context.peer_identities(), context.peer_identity_key())
        seen["before"] = (context.code(), context.details(), list(context.trailing_metadata() or ()), context.done())
        context.set_code(grpc.StatusCode.ABORTED)
        context.set_details("why")
        context.set_trailing_metadata((("x-trailer", "value"),))
        seen["after"] = (context.code(), context.details(), [tuple(each) for each in context.trailing_metadata()])
        seen["limited"] = context.time_remaining() is not None
        context.disable_next_message_compression()
        with pytest.raises(grpc.aio.AbortError):
            await context.abort(grpc.StatusCode.DATA_LOSS)
        with pytest.raises(grpc.aio.UsageError):
            await context.abort(grpc.StatusCode.DATA_LOSS)
        yield b""

    async with lab(grpc_transport, {"Look": handler}) as server:
        await ends_with(server.stream("Look"), grpc.StatusCode.DATA_LOSS)
    assert seen == {
        "peer": True,
        "identities": (None, None),
        "before": (None, "", [], False),
        "after": (grpc.StatusCode.ABORTED, "why", [("x-trailer", "value")]),
        "limited": False,
    }


@pytest.mark.parametrize("ends", ["well", "badly", "by the client"])
async def test_done_callbacks_run_after_every_end(grpc_transport: str, ends: str) -> None:
    """Each callback runs once, after success, an abort or a disconnect."""
    called = asyncio.Queue()

    async def handler(request, context):
        context.add_done_callback(called.put_nowait)
        yield b""
        if ends == "badly":
            await context.abort(grpc.StatusCode.ABORTED, "")
        if ends == "by the client":
            await asyncio.Event().wait()

    async with lab(grpc_transport, {"Done": handler}) as server:
        call = server.stream("Done")
        await call.read()
        if ends == "by the client":
            call.cancel()
        await asyncio.wait_for(called.get(), PATIENCE)
    assert called.empty()


@pytest.mark.parametrize("messages", [0, 2])
async def test_a_deadline_cancels_the_handler_and_ends_the_call(grpc_transport: str, messages: int) -> None:
    """The handler can read the remaining time and is cancelled; the client gets DEADLINE_EXCEEDED."""
    seen = asyncio.Queue()

    async def then(context):
        seen.put_nowait(context.time_remaining())
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.put_nowait("cancelled")
            raise

    async with lab(grpc_transport, {"Wait": after(messages, then)}) as server:
        await ends_with(server.stream("Wait", timeout=0.5), grpc.StatusCode.DEADLINE_EXCEEDED)
        # gRPC rounds the deadline up.
        assert 0 <= await asyncio.wait_for(seen.get(), PATIENCE) <= 0.6
        assert await asyncio.wait_for(seen.get(), PATIENCE) == "cancelled"


@pytest.mark.parametrize("messages", [0, 1])
async def test_a_disconnect_cancels_a_waiting_handler(grpc_transport: str, messages: int) -> None:
    """CancelledError is raised in the handler at once, before and after its first message."""
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def then(context):
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with lab(grpc_transport, {"Wait": after(messages, then)}) as server:
        call = server.stream("Wait")
        if messages:
            await call.read()
        await asyncio.wait_for(waiting.wait(), PATIENCE)
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), PATIENCE)


async def test_a_disconnect_stops_a_handler_that_never_waits(grpc_transport: str) -> None:
    """A generator that is always ready does not block the event loop, and its `finally` runs after a disconnect."""
    ended = asyncio.Event()

    async def endless(request, context):
        try:
            for number in itertools.count():
                yield b"%d" % number
        finally:
            ended.set()

    async with lab(grpc_transport, {"Endless": endless}) as server:
        call = server.stream("Endless")
        await call.read()
        call.cancel()
        await asyncio.wait_for(ended.wait(), PATIENCE)


async def test_a_slow_reader_gets_everything_in_order(grpc_transport: str) -> None:
    """4 MB arrive complete, although the client starts reading late."""

    async def much(request, context):
        for number in range(40):
            yield number.to_bytes(4, "big") * 25_000

    async with lab(grpc_transport, {"Much": much}) as server:
        call = server.stream("Much")
        await call.initial_metadata()
        numbers = [int.from_bytes(message[:4], "big") async for message in call]
    assert numbers == list(range(40))


async def test_an_unknown_method_is_unimplemented(grpc_transport: str) -> None:
    """The client gets a gRPC status instead of an HTTP error."""
    async with lab(grpc_transport) as server:
        await ends_with(server.stream("NoSuch"), grpc.StatusCode.UNIMPLEMENTED)
