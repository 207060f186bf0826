"""grpc-web calls as their clients and servers come and go: connections, readers who stall, stopping, other apps."""

from __future__ import annotations

import asyncio
import socket
import struct

import grpc
import h11
import pytest

from calotype_server.limits import PortLimits
from calotype_server.transport.grpcweb import GrpcWeb
from support.grpcweb import Connection, Frames, frame, read_answer
from support.lab import NAME, PATIENCE, echo, handlers, lab, turns, until

UNAVAILABLE = "14"


async def count(request, context):
    """Streams three messages."""
    for number in range(3):
        yield b"%d" % number


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Nothing of the second is taken for a part of the first."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await Connection.open(server.address)
        for message in (b"first", b"second", b"third"):
            kind = {"host": server.address, "content-type": "application/grpc-web"}
            await connection.request("POST", f"/{NAME}/Echo", kind, frame(message))
        answers = [read_answer(await connection.answer())[0]]
        for _ in range(2):
            connection.next_answer()
            head, body = await connection.event(), b""
            while isinstance(event := await connection.event(), h11.Data):
                body += event.data
            answers.append(read_answer((head, body))[0])
        connection.close()
    assert answers == [[b"first"], [b"second"], [b"third"]]


async def test_a_client_who_pipelines_and_leaves_cancels_the_running_call() -> None:
    """The server below tells it only to the newest request."""
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(request, context):
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        yield

    async with lab(methods={"Wait": wait, "Echo": echo}) as server:
        connection = await server.post("Wait")
        await asyncio.wait_for(waiting.wait(), PATIENCE)
        kind = {"host": server.address, "content-type": "application/grpc-web"}
        await connection.request("POST", f"/{NAME}/Echo", kind, frame(b""))
        connection.close()
        await asyncio.wait_for(cancelled.wait(), PATIENCE)


async def test_leaving_after_the_end_harms_nobody() -> None:
    """A connection that closes late, or is used again, is nothing special."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", frame(b"1"))
        assert read_answer(await connection.answer())[0] == [b"1"]
        connection.close()
        connection = await server.post("Echo", frame(b"2"))
        assert read_answer(await connection.answer())[0] == [b"2"]
        connection.close()


async def test_a_reader_who_stalls_is_dropped() -> None:
    """One that takes nothing for as long as the limit says loses its connection, and the handler is ended."""
    ended = asyncio.Event()

    async def endless(request, context):
        try:
            while True:
                yield bytes(100_000)
        finally:
            ended.set()

    async with lab(methods={"Endless": endless}, limits=PortLimits(stall_seconds=0.2)) as server:
        connection = await server.post("Endless")
        await asyncio.wait_for(ended.wait(), PATIENCE)
        connection.close()


async def test_a_stalled_reader_holds_little_of_what_is_sent() -> None:
    """A handler is held back as soon as the buffers between are full, which are small."""
    sent = 0

    async def endless(request, context):
        nonlocal sent
        while True:
            yield bytes(20_000)
            sent += 20_000

    async with lab(methods={"Endless": endless}, limits=PortLimits(stall_seconds=1)) as server:
        address = server.address.rpartition(":")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (address[0], int(address[2])))
        head = f"POST /{NAME}/Endless HTTP/1.1\r\nhost: x.localhost\r\ncontent-type: application/grpc-web\r\n"
        await asyncio.get_running_loop().sock_sendall(sock, (head + "content-length: 5\r\n\r\n").encode() + frame(b""))
        await until(lambda: sent)
        await until(lambda: not server.server.active_calls)
        sock.close()
    assert 0 < sent < 2_000_000


async def test_stopping_lets_calls_end_and_refuses_new_ones() -> None:
    """What runs ends well within the grace; what comes on an open connection is UNAVAILABLE with details."""
    go_on, waiting = asyncio.Event(), asyncio.Event()

    async def wait(request, context):
        waiting.set()
        await go_on.wait()
        yield b"done"

    async with lab(methods={"Wait": wait, "Echo": echo}) as server:
        running = await server.post("Wait")
        idle = await Connection.open(server.address)
        await asyncio.wait_for(waiting.wait(), PATIENCE)
        stopping = asyncio.create_task(server.server.stop(PATIENCE))
        await asyncio.sleep(0)
        kind = {"host": server.address, "content-type": "application/grpc-web"}
        await idle.request("POST", f"/{NAME}/Echo", kind, frame(b""))
        _, trailers = read_answer(await idle.answer())
        assert trailers["grpc-status"] == UNAVAILABLE
        assert trailers["grpc-status-details-bin"]
        go_on.set()
        assert read_answer(await running.answer())[0] == [b"done"]
        await asyncio.wait_for(stopping, PATIENCE)
        running.close()
        idle.close()


async def test_what_has_not_ended_after_the_grace_is_ended() -> None:
    """With UNAVAILABLE after the messages that were sent, and a handler that has unwound."""
    unwound = asyncio.Event()

    async def wait(request, context):
        yield b"first"
        try:
            await asyncio.Event().wait()
        finally:
            unwound.set()

    async with lab(methods={"Wait": wait}) as server:
        connection = await server.post("Wait")
        connection.expect()
        head = await connection.event()
        body = (await connection.event()).data
        await server.server.stop(0)
        while isinstance(event := await connection.event(), h11.Data):
            body += event.data
        messages, trailers = read_answer((head, bytes(body)))
        connection.close()
    assert (messages, trailers["grpc-status"]) == ([b"first"], UNAVAILABLE)
    assert unwound.is_set()


SCOPE = {
    "type": "http",
    "method": "POST",
    "path": f"/{NAME}/Count",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/grpc-web")],
    "client": None,
}
REQUEST = {"type": "http.request", "body": frame(b""), "more_body": False}


async def call_application(application, scope: dict, events: list[dict]) -> list[dict]:
    """Sends events and returns those that come back, by functions that return awaitables but no coroutines."""
    loop = asyncio.get_running_loop()
    sent, left = [], list(events)

    def receive():
        future = loop.create_future()
        if left:
            future.set_result(left.pop(0))
        return future

    def send(event):
        sent.append(event)
        future = loop.create_future()
        future.set_result(None)
        return future

    await application(scope, receive, send)
    return sent


class TestAsApplication:
    """What another ASGI server, or an app around this one, may do; without a socket."""

    @staticmethod
    def app(fallback=None) -> GrpcWeb:
        """One with a method."""
        app = GrpcWeb(fallback)
        app.add_generic_rpc_handlers([handlers({"Count": count})])
        return app

    async def test_an_end_of_the_request_that_comes_late_loses_no_message(self) -> None:
        """A proxy may send the last, empty piece long after the message, while the answer already waits to be read."""
        sent, arriving, room = [], asyncio.Queue(), asyncio.Event()

        async def send(event):
            if len(sent) == 2:
                await room.wait()
            sent.append(event)

        arriving.put_nowait({**REQUEST, "more_body": True})
        answering = asyncio.create_task(self.app()(SCOPE, arriving.get, send))
        await turns(100)
        arriving.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        await turns(100)
        room.set()
        await asyncio.wait_for(answering, PATIENCE)
        frames = Frames(text=False).feed(b"".join(event.get("body", b"") for event in sent))
        assert [data for _, data in frames[:-1]] == [b"0", b"1", b"2"]

    async def test_awaitables_need_not_be_coroutines(self) -> None:
        """As those of granian are not."""
        sent = await call_application(self.app(), SCOPE, [REQUEST])
        body = b"".join(event.get("body", b"") for event in sent)
        assert [data for _, data in Frames(text=False).feed(body)][:3] == [b"0", b"1", b"2"]

    async def test_it_may_be_mounted_under_a_path(self) -> None:
        """`root_path` is no part of a method's name."""
        scope = {**SCOPE, "root_path": "/api", "path": f"/api/{NAME}/Count"}
        sent = await call_application(self.app(), scope, [REQUEST])
        assert sent[0]["status"] == 200
        assert b"grpc-status: 0" in sent[-1]["body"]

    @pytest.mark.parametrize("kind", ["lifespan", "websocket"])
    async def test_other_protocols_are_for_the_application_behind(self, kind: str) -> None:
        """Untouched."""
        seen = []

        async def behind(scope, receive, send):
            seen.append(scope["type"])

        await call_application(self.app(behind), {"type": kind}, [])
        assert seen == [kind]

    async def test_a_handler_that_ignores_its_cancellation_writes_no_more(self) -> None:
        """The status is the last thing sent, whatever the handler does."""

        async def stubborn(request, context):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                yield b"too late"

        app = GrpcWeb(None)
        app.add_generic_rpc_handlers([handlers({"Count": stubborn})])
        scope = {**SCOPE, "headers": [*SCOPE["headers"], (b"grpc-timeout", b"1m")]}
        sent = await call_application(app, scope, [REQUEST])
        assert b"too late" not in b"".join(event.get("body", b"") for event in sent)
        assert b"grpc-status: 4" in sent[-1]["body"]
        assert [event.get("more_body") for event in sent] == [None, False]


async def test_interceptors_surround_every_call() -> None:
    """The outermost first, with the method and the metadata, and what they return is called."""
    order = []

    class Note(grpc.aio.ServerInterceptor):
        def __init__(self, name: str) -> None:
            self.name = name

        async def intercept_service(self, continuation, details):
            order.append((self.name, details.method, dict(details.invocation_metadata).get("x-text")))
            return await continuation(details)

    app = GrpcWeb(None, interceptors=[Note("outer"), Note("inner")])
    app.add_generic_rpc_handlers([handlers({"Count": count})])
    scope = {**SCOPE, "headers": [*SCOPE["headers"], (b"x-text", b"a")]}
    sent = await call_application(app, scope, [REQUEST])
    assert order == [("outer", f"/{NAME}/Count", "a"), ("inner", f"/{NAME}/Count", "a")]
    assert struct.unpack_from(">BI", sent[-1]["body"])[0] == 0x80
