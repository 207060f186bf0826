"""The wire format, for any bytes."""

from __future__ import annotations

import base64
from urllib.parse import unquote

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.transport.grpcweb import framing
from calotype_server.transport.grpcweb.framing import CallRejected, Status, decode_request, encode_message
from support.grpcweb import Frames, frame, parse_trailers


@given(st.binary(), st.booleans())
def test_any_body_is_a_message_or_refused(body: bytes, text: bool) -> None:
    """Nothing else is raised, and what is accepted is what was framed."""
    try:
        message = decode_request(body, text=text)
    except CallRejected as refused:
        assert refused.status.details
    else:
        assert text or body == frame(message)


@given(st.binary(), st.data())
def test_text_is_read_however_its_pieces_were_padded(message: bytes, data: st.DataObject) -> None:
    """A client may encode any pieces one by one."""
    wire = frame(message)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=4)))
    pieces = [wire[start:end] for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    body = b"".join(base64.b64encode(piece) for piece in pieces)
    assert decode_request(body, text=True) == message
    assert len(base64.b64encode(wire)) <= framing.wire_size(len(message), text=True)


@given(st.binary(), st.booleans())
def test_what_is_written_is_read_by_another(message: bytes, text: bool) -> None:
    """Messages come back as they were."""
    assert Frames(text=text).feed(encode_message(message, text=text)) == [(0, message)]


@given(st.text(), st.booleans())
def test_no_text_of_a_status_breaks_the_trailers(details: str, text: bool) -> None:
    """Neither line breaks nor other alphabets: the trailers stay what they are."""
    status = Status(grpc.StatusCode.ABORTED, details.encode("utf-8", "ignore").decode(), (("x-a-bin", b"\r\n"),))
    [(flags, data)] = Frames(text=text).feed(framing.encode_trailers(status, text=text))
    trailers = parse_trailers(data)
    assert (flags, trailers["grpc-status"], trailers["x-a-bin"]) == (0x80, "10", b"\r\n")
    assert unquote(trailers.get("grpc-message", "")) == status.details
    assert set(trailers) <= {"grpc-status", "grpc-message", "x-a-bin"}


@given(st.text(max_size=12))
def test_any_timeout_is_seconds_or_refused(value: str) -> None:
    """Nothing else is raised."""
    try:
        assert framing.parse_timeout(value) >= 0
    except CallRejected as refused:
        assert "grpc-timeout" in refused.status.details


@pytest.mark.parametrize("metadata", [(("a", 1),), (("a b", "x"),), (("", "x"),), (("a-bin", "x"),), (("a", b"x"),)])
def test_metadata_that_is_none_is_refused(metadata) -> None:
    """By its key."""
    with pytest.raises(ValueError, match="metadata was invalid"):
        framing.check_metadata(metadata)
