"""The grpc-web wire format, for arbitrary bytes."""

from __future__ import annotations

import base64
from urllib.parse import unquote

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.errors import ServiceError
from calotype_server.transport.grpcweb import framing
from calotype_server.transport.grpcweb.framing import Status, decode_request, encode_message
from support.grpcweb import Frames, frame, parse_trailers


@given(st.binary(), st.booleans())
def test_any_body_is_decoded_or_rejected(body: bytes, text: bool) -> None:
    """No other exception is raised, and an accepted body is exactly one frame."""
    try:
        message = decode_request(body, text=text)
    except ServiceError as rejected:
        assert rejected.message
    else:
        assert text or body == frame(message)


@given(st.binary(), st.data())
def test_base64_may_be_padded_anywhere(message: bytes, data: st.DataObject) -> None:
    """A client may encode pieces of the frame separately."""
    wire = frame(message)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=4)))
    pieces = [wire[start:end] for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    body = b"".join(base64.b64encode(piece) for piece in pieces)
    assert decode_request(body, text=True) == message
    assert len(base64.b64encode(wire)) <= framing.wire_size(len(message), text=True)


@given(st.binary(), st.booleans())
def test_encoded_messages_are_decoded_by_an_independent_decoder(message: bytes, text: bool) -> None:
    """The decoded message equals the original."""
    assert Frames(text=text).feed(encode_message(message, text=text)) == [(0, message)]


@given(st.text(), st.booleans())
def test_any_status_text_keeps_the_trailers_intact(details: str, text: bool) -> None:
    """Line breaks and non-ASCII characters in the text do not add or change trailers."""
    status = Status(grpc.StatusCode.ABORTED, details.encode("utf-8", "ignore").decode(), (("x-a-bin", b"\r\n"),))
    [(flags, data)] = Frames(text=text).feed(framing.encode_trailers(status, text=text))
    trailers = parse_trailers(data)
    assert (flags, trailers["grpc-status"], trailers["x-a-bin"]) == (0x80, "10", b"\r\n")
    assert unquote(trailers.get("grpc-message", "")) == status.details
    assert set(trailers) <= {"grpc-status", "grpc-message", "x-a-bin"}


@given(st.text(max_size=12))
def test_any_timeout_is_parsed_or_rejected(value: str) -> None:
    """No other exception is raised."""
    try:
        assert framing.parse_timeout(value) >= 0
    except ServiceError as rejected:
        assert "grpc-timeout" in rejected.message


@pytest.mark.parametrize("metadata", [(("a", 1),), (("a b", "x"),), (("", "x"),), (("a-bin", "x"),), (("a", b"x"),)])
def test_invalid_metadata_is_rejected(metadata) -> None:
    """The error names the key."""
    with pytest.raises(ValueError, match="metadata was invalid"):
        framing.check_metadata(metadata)
