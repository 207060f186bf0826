"""Requests that violate the protocol get the same status and reason on every gRPC port.

The codes are those of gRPC's statuscodes.md: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from support.engine.fake_engine import FakeEngine
from support.grpcweb import CODES, Connection, frame, header_dict, read_answer
from support.service import Service, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVICE = "/calotype.v1.GenerationService"
HEALTH = "/grpc.health.v1.Health/Check"
UNREADABLE = b"\xff\xff\xff\xff"


@dataclass(frozen=True)
class Case:
    """A call with any number of requests, and how it ends."""

    name: str
    path: str
    requests: tuple[bytes, ...]
    code: grpc.StatusCode
    reason: str


CASES = [
    Case(f"{name} {method}", f"{SERVICE}/{method}", requests, code, reason)
    for method in ("Generate", "GetModel")
    for name, requests, code, reason in (
        ("no request", (), grpc.StatusCode.UNIMPLEMENTED, "WRONG_REQUEST_COUNT"),
        ("two requests", (b"", b""), grpc.StatusCode.UNIMPLEMENTED, "WRONG_REQUEST_COUNT"),
        ("unreadable", (UNREADABLE,), grpc.StatusCode.INTERNAL, "REQUEST_UNREADABLE"),
    )
]
CASES += [
    Case("unknown method", f"{SERVICE}/Paint", (b"",), grpc.StatusCode.UNIMPLEMENTED, "METHOD_NOT_FOUND"),
    Case("unknown service", "/calotype.v9.Nothing/Paint", (b"",), grpc.StatusCode.UNIMPLEMENTED, "METHOD_NOT_FOUND"),
    Case("unknown health", HEALTH, (b"\x0a\x01x",), grpc.StatusCode.NOT_FOUND, "SERVICE_NOT_FOUND"),
    Case("invalid", f"{SERVICE}/Generate", (b"",), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
]


@pytest.fixture
async def service(grpc_transport: str) -> AsyncIterator[Service]:
    """A server on each gRPC port."""
    async with running(FakeEngine(), transport=grpc_transport) as service:
        yield service


async def end_of(service: Service, transport: str, path: str, requests: tuple[bytes, ...]) -> tuple[Any, Status]:
    """Returns the code and the detailed status of a call without messages."""
    if transport == "native":

        async def sent() -> AsyncIterator[bytes]:
            for request in requests:
                yield request

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.channel.stream_stream(path)(sent()).read()
        trailers = dict(caught.value.trailing_metadata())
        code = caught.value.code()
    else:
        body = b"".join(frame(request) for request in requests)
        messages, trailers = await post(service, path, body, text=transport == "grpc-web-text")
        assert messages == []
        code = CODES[int(trailers["grpc-status"])]
    return code, Status.FromString(trailers["grpc-status-details-bin"])


async def post(service: Service, path: str, body: bytes, *, text: bool = False, **headers: str) -> Any:
    """Returns the messages and trailers of a grpc-web call, and its headers if `headers` are given."""
    connection = await Connection.open(service.address)
    kind = f"application/grpc-web{'-text' if text else ''}+proto"
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    wire = base64.b64encode(body) if text else body
    await connection.request("POST", path, {"host": service.address, "content-type": kind, **given}, wire)
    answer = await connection.answer()
    connection.close()
    found = read_answer(answer, text=text)
    return (*found, header_dict(answer[0])) if headers else found


def info_of(status: Status) -> ErrorInfo:
    """Returns the `ErrorInfo` of a status, which is its first detail."""
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_a_violation_of_the_protocol_has_the_code_of_grpc_and_a_reason(
    service: Service, grpc_transport: str, case: Case
) -> None:
    """The status has the code of statuscodes.md and an `ErrorInfo` with the domain calotype and a reason."""
    code, status = await end_of(service, grpc_transport, case.path, case.requests)
    assert (code, status.code) == (case.code, case.code.value[0])
    assert (info_of(status).reason, info_of(status).domain) == (case.reason, "calotype")


@pytest.mark.parametrize("grpc_transport", ["grpc-web", "grpc-web-text", "bridge"])
async def test_an_unsupported_compression_is_unimplemented(service: Service, grpc_transport: str) -> None:
    """The response names the supported algorithms in grpc-accept-encoding, as gRPC's compression.md requires."""
    text = grpc_transport == "grpc-web-text"
    body = frame(b"compressed", 1)
    _, trailers, headers = await post(service, f"{SERVICE}/GetModel", body, text=text, grpc_encoding="br")
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert (trailers["grpc-status"], info_of(status).reason) == ("12", "COMPRESSION_UNSUPPORTED")
    assert headers["grpc-accept-encoding"] == "identity"


@pytest.mark.parametrize("grpc_transport", ["grpc-web", "grpc-web-text", "bridge"])
async def test_a_compressed_message_without_an_algorithm_is_internal(service: Service, grpc_transport: str) -> None:
    """A message that is marked as compressed cannot be decompressed if grpc-encoding names no algorithm."""
    body = frame(b"compressed", 1)
    _, trailers = await post(service, f"{SERVICE}/GetModel", body, text=grpc_transport == "grpc-web-text")
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert (trailers["grpc-status"], info_of(status).reason) == ("13", "REQUEST_UNREADABLE")


@pytest.mark.parametrize("grpc_transport", ["grpc-web", "grpc-web-text", "bridge"])
async def test_a_deadline_that_passes_has_a_reason(service: Service, grpc_transport: str) -> None:
    """The web ports end the call themselves, and add an `ErrorInfo` to the status."""
    service.engine.hold()
    request = frame(b"\x0a\x01x")
    path = f"{SERVICE}/Generate"
    text = grpc_transport == "grpc-web-text"
    _, trailers, _ = await post(service, path, request, text=text, grpc_timeout="50m")
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert trailers["grpc-status"] == "4"
    assert info_of(status).domain == "calotype"
    service.engine.allow()
