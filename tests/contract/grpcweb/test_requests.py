"""grpc-web requests byte by byte, from clients, browsers, proxies and attackers, and the responses to them."""

from __future__ import annotations

import asyncio
import base64

import h11
import pytest

from calotype_server.limits import PortLimits
from support.grpcweb import Connection, frame, header_dict, read_answer
from support.lab import NAME, bidi, echo, lab, status, until

OK, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = "0", "3", "8", "12", "13"
DEADLINE_EXCEEDED = "4"


@pytest.mark.parametrize("text", [False, True])
async def test_a_request_may_arrive_byte_by_byte(text: bool) -> None:
    """Pieces may end anywhere, also within the length prefix or within 4 characters of base64."""
    wire = frame(b"a message")
    body = base64.b64encode(wire) if text else wire
    kind = f"application/grpc-web{'-text' if text else ''}+proto"
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", content_type=kind, transfer_encoding="chunked")
        for index in range(len(body)):
            await connection.send(b"1\r\n" + body[index : index + 1] + b"\r\n")
            await asyncio.sleep(0)
        await connection.send(b"0\r\n\r\n")
        messages, trailers = read_answer(await connection.answer(), text=text)
        connection.close()
    assert (messages, trailers["grpc-status"]) == ([b"a message"], OK)


async def test_base64_may_be_padded_in_the_middle() -> None:
    """A client that encodes its pieces separately pads each of them."""
    wire = frame(b"a message")
    body = base64.b64encode(wire[:4]) + base64.b64encode(wire[4:])
    assert b"=" in body[:-4]
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", body, content_type="application/grpc-web-text")
        assert read_answer(await connection.answer(), text=True)[0] == [b"a message"]
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
async def test_the_response_has_the_content_type_of_the_request(sent: str, received: str, accept: str) -> None:
    """Accept has no influence: browsers send */*, which is not a type."""
    text = "text" in sent
    body = base64.b64encode(frame(b"x")) if text else frame(b"x")
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", body, content_type=sent, accept=accept)
        head, body = await connection.answer()
        connection.close()
    assert header_dict(head)["content-type"] == received
    assert header_dict(head)["cache-control"] == "no-store"
    assert read_answer((head, body), text=text)[0] == [b"x"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", UNIMPLEMENTED),
        (b"\0\0\0", INTERNAL),
        (b"\0\0\0\1\0abc", INTERNAL),
        (frame(b"abc") + b"x", INTERNAL),
        (frame(b"abc") + frame(b"abc"), UNIMPLEMENTED),
        (frame(b"grpc-status: 0\r\n", 0x80), INTERNAL),
        (frame(b"abc", 1), INTERNAL),
        (frame(b"x" * 65_537), RESOURCE_EXHAUSTED),
    ],
    ids=["empty", "half a prefix", "truncated", "trailing", "two messages", "trailers", "compressed", "oversized"],
)
async def test_a_body_that_is_not_one_message_never_reaches_a_handler(body: bytes, expected: str) -> None:
    """Each gets a status, in binary and in text mode."""
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
async def test_invalid_base64_is_rejected(body: bytes) -> None:
    """The call ends with INTERNAL, the code of gRPC for a request that cannot be parsed."""
    async with lab(methods={"Echo": echo}) as server:
        assert await status(server, "Echo", body, content_type="application/grpc-web-text") == INTERNAL


async def test_the_largest_request_passes_and_one_byte_more_does_not() -> None:
    """The limit applies to the message, in binary and in text mode."""
    async with lab(methods={"Echo": echo}, limits=PortLimits(max_request_bytes=1000)) as server:
        for text in (False, True):
            kind = f"application/grpc-web{'-text' if text else ''}"
            largest, larger = frame(b"x" * 1000), frame(b"x" * 1001)
            connection = await server.post("Echo", base64.b64encode(largest) if text else largest, content_type=kind)
            assert read_answer(await connection.answer(), text=text)[0] == [b"x" * 1000]
            connection.close()
            body = base64.b64encode(larger) if text else larger
            assert await status(server, "Echo", body, content_type=kind) == RESOURCE_EXHAUSTED


async def test_an_endless_upload_is_rejected() -> None:
    """Without a content-length, the response arrives while the client is still sending."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", transfer_encoding="chunked")
        connection.expect()
        sending = asyncio.create_task(_send_forever(connection))
        assert isinstance(head := await connection.event(), h11.Response)
        body = (await connection.event()).data
        sending.cancel()
        connection.close()
    assert read_answer((head, bytes(body)))[1]["grpc-status"] == RESOURCE_EXHAUSTED


async def _send_forever(connection: Connection) -> None:
    while True:
        await connection.send(b"400\r\n" + b"x" * 1024 + b"\r\n")


async def test_an_incomplete_upload_times_out() -> None:
    """A client that sends part of a request and then waits gets a status."""
    async with lab(methods={"Echo": echo}, limits=PortLimits(request_seconds=0.05)) as server:
        connection = await server.post("Echo", transfer_encoding="chunked")
        await connection.send(b"3\r\n\0\0\0\r\n")
        assert read_answer(await connection.answer())[1]["grpc-status"] == DEADLINE_EXCEEDED
        connection.close()


async def test_a_disconnect_while_sending_ends_the_call() -> None:
    """No active call remains."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo", transfer_encoding="chunked")
        await connection.send(b"3\r\n\0\0\0\r\n")
        await until(lambda: server.server.active_calls)
        connection.close()
        await until(lambda: not server.server.active_calls)


@pytest.mark.parametrize("value", ["", "1", "S", "abc", "-1S", "1.5S", "123456789S", "1x", "1 S", "\u0661S"])
async def test_an_invalid_timeout_is_rejected(value: str) -> None:
    """It must not mean "no timeout", because then the call would never time out."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await Connection.open(server.address)
        kind = {"host": server.address, "content-type": "application/grpc-web"}
        raw = value.encode().decode("latin-1")
        await connection.request("POST", f"/{NAME}/Echo", {**kind, "grpc-timeout": raw}, frame(b""))
        messages, trailers = read_answer(await connection.answer())
        connection.close()
    assert messages == []
    assert trailers["grpc-status"] == INVALID_ARGUMENT
    assert trailers["grpc-message"].startswith("grpc-timeout")


@pytest.mark.parametrize(
    ("value", "seconds"), [("2H", 7200), ("3M", 180), ("4S", 4), ("99999999m", 99999.999), ("99999999u", 99.999999)]
)
async def test_every_unit_of_a_timeout_is_supported(value: str, seconds: float) -> None:
    """Units from hours to microseconds are converted correctly."""
    seen = []

    async def handler(request, context):
        seen.append(context.time_remaining())
        yield b""

    async with lab(methods={"Call": handler}) as server:
        connection = await server.post("Call", grpc_timeout=value)
        read_answer(await connection.answer())
        connection.close()
    assert seconds * 0.5 < seen[0] <= seconds


async def test_metadata_excludes_http_headers_and_decodes_binary_values() -> None:
    """Metadata has binary values with and without padding, but no cookies, HTTP headers or non-ASCII values."""
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
        assert read_answer(await connection.answer())[1]["grpc-status"] == OK
        connection.close()
        assert await status(server, "Call", x_some_bin="***") == INVALID_ARGUMENT
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
async def test_a_servicer_cannot_inject_trailers(bad) -> None:
    """Trailing metadata that could look like another trailer is an error."""

    async def handler(request, context):
        context.set_trailing_metadata((bad,))
        yield b""

    async with lab(methods={"Call": handler}) as server:
        assert await status(server, "Call") == INTERNAL


async def test_a_method_with_streamed_requests_is_unimplemented() -> None:
    """The status names the gRPC port, which offers the method."""

    @bidi
    async def chat(requests, context):
        yield b""

    async with lab(methods={"Chat": chat}) as server:
        connection = await server.post("Chat")
        _, trailers = read_answer(await connection.answer())
        connection.close()
    assert trailers["grpc-status"] == UNIMPLEMENTED
    assert "gRPC port" in trailers["grpc-message"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/json", "application/grpc", "application/grpc-web+json", ""]
)
async def test_other_content_types_are_rejected_before_the_handler(kind: str) -> None:
    """Pages of any site can send text/plain without a CORS preflight request."""
    called = []

    async def handler(request, context):
        called.append(request)
        yield b""

    async with lab(methods={"Call": handler}) as server:
        connection = await server.post("Call", content_type=kind)
        head, _ = await connection.answer()
        connection.close()
    assert (head.status_code, called) == (415, [])
    assert "application/grpc-web" in header_dict(head)["accept-post"]


async def test_other_http_methods_are_rejected() -> None:
    """The response is 405 and names POST."""
    async with lab(methods={"Echo": echo}) as server:
        for method in ("GET", "PUT", "OPTIONS"):
            connection = await Connection.open(server.address)
            await connection.request(method, f"/{NAME}/Echo", {"host": server.address})
            head, _ = await connection.answer(method)
            connection.close()
            assert (head.status_code, header_dict(head)["allow"]) == (405, "POST")
