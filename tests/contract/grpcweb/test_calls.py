"""grpc-web calls: connections, disconnects, stalled readers, a stopping server, and use as an ASGI app."""

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
from support.lab import NAME, PATIENCE, echo, handlers, lab, run_loop, until

UNAVAILABLE = "14"


async def count(request, context):
    """Streams three messages."""
    for number in range(3):
        yield b"%d" % number


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Bytes of one request never become part of another."""
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


async def test_a_disconnect_with_pipelined_requests_cancels_the_active_call() -> None:
    """Without our changes, uvicorn reports a disconnect only to the newest request."""
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


async def test_a_disconnect_after_the_end_has_no_effect() -> None:
    """The next call works after a connection has closed late."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", frame(b"1"))
        assert read_answer(await connection.answer())[0] == [b"1"]
        connection.close()
        connection = await server.post("Echo", frame(b"2"))
        assert read_answer(await connection.answer())[0] == [b"2"]
        connection.close()


async def test_a_stalled_reader_is_dropped() -> None:
    """After the stall timeout the connection closes and the handler ends."""
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


async def test_buffers_for_a_stalled_reader_are_small() -> None:
    """A handler must wait as soon as the small buffers between it and the reader are full."""
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


async def test_stopping_completes_active_calls_and_rejects_new_ones() -> None:
    """An active call completes within the grace period; a new call gets UNAVAILABLE with details."""
    proceed, waiting = asyncio.Event(), asyncio.Event()

    async def wait(request, context):
        waiting.set()
        await proceed.wait()
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
        proceed.set()
        assert read_answer(await running.answer())[0] == [b"done"]
        await asyncio.wait_for(stopping, PATIENCE)
        running.close()
        idle.close()


async def test_calls_still_active_after_the_grace_period_are_ended() -> None:
    """The client gets UNAVAILABLE after the messages sent so far, and the handler has unwound."""
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
    """Sends events and returns the received ones. Its functions return awaitables that are not coroutines."""
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
    """Behaviour that another ASGI server, or an app around this one, may rely on; without a socket."""

    @staticmethod
    def app(fallback=None) -> GrpcWeb:
        """Returns an app with one method."""
        app = GrpcWeb(fallback)
        app.add_generic_rpc_handlers([handlers({"Count": count})])
        return app

    async def test_a_late_end_of_the_request_loses_no_message(self) -> None:
        """A proxy may send the last, empty piece long after the message, while the response is ready to send."""
        sent, arriving, room = [], asyncio.Queue(), asyncio.Event()

        async def send(event):
            if len(sent) == 2:
                await room.wait()
            sent.append(event)

        arriving.put_nowait({**REQUEST, "more_body": True})
        answering = asyncio.create_task(self.app()(SCOPE, arriving.get, send))
        await run_loop(100)
        arriving.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        await run_loop(100)
        room.set()
        await asyncio.wait_for(answering, PATIENCE)
        frames = Frames(text=False).feed(b"".join(event.get("body", b"") for event in sent))
        assert [data for _, data in frames[:-1]] == [b"0", b"1", b"2"]

    async def test_awaitables_need_not_be_coroutines(self) -> None:
        """The awaitables of granian are not coroutines."""
        sent = await call_application(self.app(), SCOPE, [REQUEST])
        body = b"".join(event.get("body", b"") for event in sent)
        assert [data for _, data in Frames(text=False).feed(body)][:3] == [b"0", b"1", b"2"]

    async def test_it_may_be_mounted_under_a_path(self) -> None:
        """`root_path` is not part of the method path."""
        scope = {**SCOPE, "root_path": "/api", "path": f"/api/{NAME}/Count"}
        sent = await call_application(self.app(), scope, [REQUEST])
        assert sent[0]["status"] == 200
        assert b"grpc-status: 0" in sent[-1]["body"]

    @pytest.mark.parametrize("kind", ["lifespan", "websocket"])
    async def test_other_protocols_go_to_the_fallback_app(self, kind: str) -> None:
        """They are passed on unchanged."""
        seen = []

        async def fallback(scope, receive, send):
            seen.append(scope["type"])

        await call_application(self.app(fallback), {"type": kind}, [])
        assert seen == [kind]

    async def test_a_handler_that_ignores_its_cancellation_cannot_write(self) -> None:
        """Nothing follows the status, even if the handler yields another message."""

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


async def test_interceptors_apply_to_every_call() -> None:
    """They run outermost first, with the method and the metadata, and the handler they return is called."""
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
