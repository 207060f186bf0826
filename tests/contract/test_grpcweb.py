"""grpc-web byte by byte: what clients, browsers, proxies and strangers send, and what must come back.

Together with the suites that run over every port, this has a case for each thing that sonora 0.2.3 does wrong.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import struct

import grpc
import h11
import pytest

from calotype_server.transport.grpcweb import GrpcWeb
from calotype_server.transport.grpcweb.call import Limits
from support.grpcweb import Connection, Frames, frame, parse_trailers
from support.lab import NAME, bidi, handlers, lab

PATIENCE = 20
"""Seconds until a test that waits for something gives up."""

OK, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = "0", "8", "12", "13", "14"
DEADLINE_EXCEEDED = "4"


async def echo(request, context):
    """Answers with the request."""
    yield request


async def count(request, context):
    """Streams three messages."""
    for number in range(3):
        yield b"%d" % number


def read(answer: tuple[h11.Response, bytes], *, text: bool = False) -> tuple[list[bytes], dict[str, str | bytes]]:
    """The messages and trailers of a complete answer to a call, which is always HTTP's 200."""
    head, body = answer
    assert head.status_code == 200, (head, body)
    frames = Frames(text=text).feed(body)
    assert [flags for flags, _ in frames] == [0] * (len(frames) - 1) + [0x80], frames
    return [data for _, data in frames[:-1]], parse_trailers(frames[-1][1])


def headers(head: h11.Response) -> dict[str, str]:
    """The headers by name."""
    return {name.decode(): value.decode() for name, value in head.headers}


async def until(condition) -> None:
    """Lets the loop run until something holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - there is nothing to wait for but the state of the server
            await asyncio.sleep(0)


async def turns(number: int) -> None:
    """Lets the loop turn, so that whatever can happen has happened."""
    for _ in range(number):
        await asyncio.sleep(0)


async def status(server, method: str, body: bytes | None = None, **given: str) -> str:
    """The status with which a call without messages ends."""
    connection = await server.post(method, body, **given)
    messages, trailers = read(await connection.answer(), text="text" in given.get("content_type", ""))
    connection.close()
    assert messages == []
    return trailers["grpc-status"]


@pytest.mark.parametrize("text", [False, True])
async def test_a_request_may_come_byte_by_byte(text: bool) -> None:
    """Wherever the pieces end: within the length, or within four characters of base64."""
    wire = frame(b"a message")
    body = base64.b64encode(wire) if text else wire
    kind = f"application/grpc-web{'-text' if text else ''}+proto"
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", content_type=kind, transfer_encoding="chunked")
        for index in range(len(body)):
            await connection.send(b"1\r\n" + body[index : index + 1] + b"\r\n")
            await asyncio.sleep(0)
        await connection.send(b"0\r\n\r\n")
        messages, trailers = read(await connection.answer(), text=text)
        connection.close()
    assert (messages, trailers["grpc-status"]) == ([b"a message"], OK)


async def test_base64_may_be_padded_in_the_middle() -> None:
    """A client that encodes its pieces one by one pads each."""
    wire = frame(b"a message")
    body = base64.b64encode(wire[:4]) + base64.b64encode(wire[4:])
    assert b"=" in body[:-4]
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", body, content_type="application/grpc-web-text")
        assert read(await connection.answer(), text=True)[0] == [b"a message"]
        connection.close()


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ("application/grpc-web", "application/grpc-web+proto"),
        ("application/grpc-web+proto", "application/grpc-web+proto"),
        ("Application/grpc-web+proto; charset=utf-8", "application/grpc-web+proto"),
        ("application/grpc-web-text", "application/grpc-web-text+proto"),
        ("application/grpc-web-text+proto", "application/grpc-web-text+proto"),
    ],
)
@pytest.mark.parametrize("accept", ["*/*", "application/grpc-web-text"])
async def test_the_answer_has_the_type_of_the_request(sent: str, received: str, accept: str) -> None:
    """Whatever Accept says: browsers send */*, and that is no type."""
    text = "text" in sent
    body = base64.b64encode(frame(b"x")) if text else frame(b"x")
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", body, content_type=sent, accept=accept)
        head, body = await connection.answer()
        connection.close()
    assert headers(head)["content-type"] == received
    assert headers(head)["cache-control"] == "no-store"
    assert read((head, body), text=text)[0] == [b"x"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", INTERNAL),
        (b"\0\0\0", INTERNAL),
        (b"\0\0\0\1\0abc", INTERNAL),
        (frame(b"abc") + b"x", INTERNAL),
        (frame(b"abc") + frame(b"abc"), INTERNAL),
        (frame(b"grpc-status: 0\r\n", 0x80), INTERNAL),
        (frame(b"abc", 1), UNIMPLEMENTED),
        (frame(b"x" * 65_537), RESOURCE_EXHAUSTED),
    ],
    ids=["empty", "half a prefix", "truncated", "trailing", "two messages", "trailers", "compressed", "oversized"],
)
async def test_a_body_that_is_not_one_message_never_reaches_a_handler(body: bytes, expected: str) -> None:
    """Each gets a status, in either mode, and the connection goes on."""
    called = []

    async def handler(request, context):
        called.append(request)
        yield b""

    async with lab(methods={"Call": handler}) as server:
        assert await status(server, "Call", body) == expected
        encoded = base64.b64encode(body)
        assert await status(server, "Call", encoded, content_type="application/grpc-web-text") == expected
    assert called == []


@pytest.mark.parametrize("body", [b"AAAA!AAA", b"AAAAA", b"AAAA AAAA", b"=AAA", "größe".encode()])
async def test_bad_base64_is_refused(body: bytes) -> None:
    """With a status."""
    async with lab(methods={"Echo": echo}) as server:
        assert await status(server, "Echo", body, content_type="application/grpc-web-text") == INTERNAL


async def test_the_largest_request_passes_and_one_byte_more_does_not() -> None:
    """The limit is of the message, in both modes."""
    async with lab(methods={"Echo": echo}, limits=Limits(request_bytes=1000)) as server:
        for text in (False, True):
            kind = f"application/grpc-web{'-text' if text else ''}"
            largest, larger = frame(b"x" * 1000), frame(b"x" * 1001)
            connection = await server.post("Echo", base64.b64encode(largest) if text else largest, content_type=kind)
            assert read(await connection.answer(), text=text)[0] == [b"x" * 1000]
            connection.close()
            body = base64.b64encode(larger) if text else larger
            assert await status(server, "Echo", body, content_type=kind) == RESOURCE_EXHAUSTED


async def test_an_endless_upload_is_cut_off() -> None:
    """Without a length announced: the answer comes while the client is still sending."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", transfer_encoding="chunked")
        connection.expect()
        sending = asyncio.create_task(_send_forever(connection))
        assert isinstance(head := await connection.event(), h11.Response)
        body = (await connection.event()).data
        sending.cancel()
        connection.close()
    assert read((head, bytes(body)))[1]["grpc-status"] == RESOURCE_EXHAUSTED


async def _send_forever(connection: Connection) -> None:
    while True:
        await connection.send(b"400\r\n" + b"x" * 1024 + b"\r\n")


async def test_an_upload_that_never_ends_is_given_up() -> None:
    """A client that sends half a request and waits gets a status, not a place for ever."""
    async with lab(methods={"Echo": echo}, limits=Limits(body_seconds=0.05)) as server:
        connection = await server.post("Echo", transfer_encoding="chunked")
        await connection.send(b"3\r\n\0\0\0\r\n")
        assert read(await connection.answer())[1]["grpc-status"] == DEADLINE_EXCEEDED
        connection.close()


async def test_a_client_who_leaves_while_sending_is_forgotten() -> None:
    """No handler runs, and no call is left."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", transfer_encoding="chunked")
        await connection.send(b"3\r\n\0\0\0\r\n")
        await until(lambda: server.server.active_calls)
        connection.close()
        await until(lambda: not server.server.active_calls)


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Nothing of the second is taken for a part of the first."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await Connection.open(server.address)
        for message in (b"first", b"second", b"third"):
            kind = {"host": server.address, "content-type": "application/grpc-web"}
            await connection.request("POST", f"/{NAME}/Echo", kind, frame(message))
        answers = [read(await connection.answer())[0]]
        for _ in range(2):
            connection.next_answer()
            head, body = await connection.event(), b""
            while isinstance(event := await connection.event(), h11.Data):
                body += event.data
            answers.append(read((head, body))[0])
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
        assert read(await connection.answer())[0] == [b"1"]
        connection.close()
        connection = await server.post("Echo", frame(b"2"))
        assert read(await connection.answer())[0] == [b"2"]
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

    async with lab(methods={"Endless": endless}, limits=Limits(send_seconds=0.2)) as server:
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

    async with lab(methods={"Endless": endless}, limits=Limits(send_seconds=1)) as server:
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


@pytest.mark.parametrize("value", ["", "1", "S", "abc", "-1S", "1.5S", "123456789S", "1x", "1 S", "\u0661S"])
async def test_a_timeout_that_is_none_is_refused(value: str) -> None:
    """Not taken for no timeout, which would run for ever."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await Connection.open(server.address)
        kind = {"host": server.address, "content-type": "application/grpc-web"}
        raw = value.encode().decode("latin-1")
        await connection.request("POST", f"/{NAME}/Echo", {**kind, "grpc-timeout": raw}, frame(b""))
        messages, trailers = read(await connection.answer())
        connection.close()
    assert messages == []
    assert trailers["grpc-status"] == INTERNAL
    assert trailers["grpc-message"].startswith("grpc-timeout")


@pytest.mark.parametrize(
    ("value", "seconds"), [("2H", 7200), ("3M", 180), ("4S", 4), ("99999999m", 99999.999), ("99999999u", 99.999999)]
)
async def test_every_unit_of_a_timeout_is_known(value: str, seconds: float) -> None:
    """From hours to microseconds."""
    seen = []

    async def handler(request, context):
        seen.append(context.time_remaining())
        yield b""

    async with lab(methods={"Call": handler}) as server:
        connection = await server.post("Call", grpc_timeout=value)
        read(await connection.answer())
        connection.close()
    assert seconds * 0.5 < seen[0] <= seconds


async def test_metadata_is_what_the_caller_meant() -> None:
    """Binary values padded or not, or joined by HTTP; not cookies and other headers of HTTP, nor what is not ASCII."""
    seen = {}

    async def handler(request, context):
        seen.update(context.invocation_metadata())
        yield b""

    async with lab(methods={"Call": handler}) as server:
        connection = await Connection.open(server.address)
        given = {
            "host": server.address,
            "content-type": "application/grpc-web",
            "cookie": "session=1",
            "origin": f"http://{server.address}",
            "sec-fetch-mode": "cors",
            "grpc-timeout": "9S",
            "accept-language": "de",
            "authorization": "Bearer x",
            "user-agent": "test",
            "x-padded-bin": "AAECAw==",
            "x-unpadded-bin": "AAECAw",
            "x-text": "a b",
            "x-latin": "\xe9",
        }
        await connection.request("POST", f"/{NAME}/Call", given, frame(b""))
        assert read(await connection.answer())[1]["grpc-status"] == OK
        connection.close()
        assert await status(server, "Call", x_some_bin="***") == INTERNAL
    assert seen == {
        "authorization": "Bearer x",
        "user-agent": "test",
        "x-padded-bin": b"\x00\x01\x02\x03",
        "x-unpadded-bin": b"\x00\x01\x02\x03",
        "x-text": "a b",
    }


@pytest.mark.parametrize(
    "bad", [("X-Upper", "a"), ("x-text", "a\r\ngrpc-status: 0"), ("x-text", "é"), ("x-a-bin", "a")]
)
async def test_metadata_that_would_break_the_answer_is_an_error(bad) -> None:
    """A servicer cannot write a second status into the trailers."""

    async def handler(request, context):
        context.set_trailing_metadata((bad,))
        yield b""

    async with lab(methods={"Call": handler}) as server:
        assert await status(server, "Call") == INTERNAL


async def test_a_method_that_streams_requests_is_explained() -> None:
    """UNIMPLEMENTED says where it is to be had."""

    @bidi
    async def chat(requests, context):
        yield b""

    async with lab(methods={"Chat": chat}) as server:
        connection = await server.post("Chat")
        _, trailers = read(await connection.answer())
        connection.close()
    assert trailers["grpc-status"] == UNIMPLEMENTED
    assert "gRPC port" in trailers["grpc-message"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/json", "application/grpc", "application/grpc-web+json", ""]
)
async def test_another_type_is_refused_before_anything_runs(kind: str) -> None:
    """A page of any site may send text/plain without asking first."""
    called = []

    async def handler(request, context):
        called.append(request)
        yield b""

    async with lab(methods={"Call": handler}) as server:
        connection = await server.post("Call", content_type=kind)
        head, _ = await connection.answer()
        connection.close()
    assert (head.status_code, called) == (415, [])
    assert "application/grpc-web" in headers(head)["accept-post"]


async def test_a_call_is_a_post() -> None:
    """Any other method is told so."""
    async with lab(methods={"Echo": echo}) as server:
        for method in ("GET", "PUT", "OPTIONS"):
            connection = await Connection.open(server.address)
            await connection.request(method, f"/{NAME}/Echo", {"host": server.address})
            head, _ = await connection.answer(method)
            connection.close()
            assert (head.status_code, headers(head)["allow"]) == (405, "POST")


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
        _, trailers = read(await idle.answer())
        assert trailers["grpc-status"] == UNAVAILABLE
        assert trailers["grpc-status-details-bin"]
        go_on.set()
        assert read(await running.answer())[0] == [b"done"]
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
        messages, trailers = read((head, bytes(body)))
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
