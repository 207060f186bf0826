"""Converts bytes and headers to messages and metadata, and back.

The wire format is defined in `PROTOCOL-WEB.md` of grpc/grpc. A message is a flag byte, four bytes of length, and the
bytes. The trailers are one more such frame, with the highest bit of the flag set. In text mode all of it is base64.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Headers = Iterable[tuple[bytes, bytes]]
    Metadatum = tuple[str, str | bytes]

__all__ = [
    "ACCEPTED",
    "CallRejected",
    "Status",
    "check_metadata",
    "decode_metadata",
    "decode_request",
    "encode_headers",
    "encode_message",
    "encode_trailers",
    "header",
    "is_text",
    "parse_timeout",
    "wire_size",
]

ACCEPTED = {
    "application/grpc-web": False,
    "application/grpc-web+proto": False,
    "application/grpc-web-text": True,
    "application/grpc-web-text+proto": True,
}
"""Content types of a call, and whether each is in text mode."""

_PREFIX = struct.Struct(">BI")
_TRAILERS_FLAG, _COMPRESSED_FLAG = 0x80, 0x01
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_BASE64_SEGMENT = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
_UNQUOTED = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"
_KEY = re.compile(r"[a-z0-9_.-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")

_NOT_METADATA = frozenset(
    [
        *("host", "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
        *("expect", "content-length", "content-type", "content-encoding", "http2-settings", "priority"),
        *("accept", "accept-encoding", "accept-language", "accept-charset", "cache-control", "pragma"),
        *("origin", "referer", "cookie", "dnt", "x-grpc-web"),
    ]
)
_NOT_METADATA_PREFIXES = (":", "sec-", "access-control-", "grpc-")


class Status(NamedTuple):
    """How a call ends."""

    code: grpc.StatusCode
    details: str = ""
    trailing_metadata: Sequence[Metadatum] = ()


class CallRejected(Exception):
    """The request violates the protocol, so the call ends before its handler starts."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.status = Status(code, details)


def header(headers: Headers, name: bytes) -> str | None:
    """Returns the first header with that name, or None."""
    return next((value.decode("latin-1") for key, value in headers if key == name), None)


def is_text(headers: Headers) -> bool | None:
    """Returns whether a request is in text mode, or None if it is not grpc-web."""
    content_type = header(headers, b"content-type") or ""
    return ACCEPTED.get(content_type.partition(";")[0].strip().lower())


def parse_timeout(value: str) -> float:
    """Returns the seconds of a `grpc-timeout`: at most 8 digits and a unit.

    Raises:
        CallRejected: The value has another form.
    """
    number, unit = value[:-1], value[-1:]
    if unit not in _UNITS or not (number.isascii() and number.isdecimal()) or len(number) > 8:
        raise CallRejected(
            grpc.StatusCode.INVALID_ARGUMENT, f"grpc-timeout: {value[:20]!r} is not at most 8 digits and a unit."
        )
    return int(number) * _UNITS[unit]


def decode_metadata(headers: Headers) -> tuple[Metadatum, ...]:
    """Returns the call's metadata: all headers except cookies and those of HTTP, browsers and gRPC itself.

    Raises:
        CallRejected: The value of a `-bin` header is not base64.
    """
    metadata: list[Metadatum] = []
    for raw_key, raw_value in headers:
        key, value = raw_key.decode("latin-1").lower(), raw_value.decode("latin-1")
        if key in _NOT_METADATA or key.startswith(_NOT_METADATA_PREFIXES):
            continue
        if key.endswith("-bin"):
            # HTTP may join several values with commas; padding is optional.
            metadata += [(key, _from_base64(part.strip(), key)) for part in value.split(",")]
        elif _VALUE.fullmatch(value):
            # gRPC allows printable ASCII only; any other value belongs to another layer.
            metadata.append((key, value))
    return tuple(metadata)


def _from_base64(value: str, key: str) -> bytes:
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except ValueError:
        raise CallRejected(grpc.StatusCode.INVALID_ARGUMENT, f"{key}: the value is not base64.") from None


def wire_size(limit: int, *, text: bool) -> int:
    """Returns the largest body in bytes that can hold a message of `limit` bytes."""
    framed = limit + _PREFIX.size
    return -(-framed // 3) * 4 if text else framed


def decode_request(body: bytes, *, text: bool) -> bytes:
    """Returns the one message in the body of a request.

    Raises:
        CallRejected: The body is not exactly one uncompressed message.
    """
    malformed = grpc.StatusCode.INVALID_ARGUMENT
    if text:
        body = _from_text(body)
    if len(body) < _PREFIX.size:
        raise CallRejected(malformed, f"The request has {len(body)} bytes; a message has at least {_PREFIX.size}.")
    flags, length = _PREFIX.unpack_from(body)
    message = body[_PREFIX.size :]
    if flags & _TRAILERS_FLAG:
        raise CallRejected(malformed, "The request starts with trailers instead of a message.")
    if flags & _COMPRESSED_FLAG:
        raise CallRejected(
            grpc.StatusCode.UNIMPLEMENTED, "Compressed requests are not supported: send the message uncompressed."
        )
    if len(message) != length:
        raise CallRejected(malformed, f"The request announces a message of {length} bytes but has {len(message)}.")
    return message


def _from_text(body: bytes) -> bytes:
    """Decodes base64 with padding anywhere: a sender may encode each piece separately."""
    segments = _BASE64_SEGMENT.findall(body)
    if sum(map(len, segments)) == len(body):
        try:
            return b"".join(base64.b64decode(segment, validate=True) for segment in segments)
        except binascii.Error:
            pass
    raise CallRejected(
        grpc.StatusCode.INVALID_ARGUMENT, "The request is not base64, although its content type says so."
    )


def check_metadata(metadata: Iterable[Metadatum]) -> tuple[Metadatum, ...]:
    """Returns `metadata` as a tuple.

    Raises:
        ValueError: gRPC does not allow a key or value; on the wire it could look like another header.
    """
    checked = tuple((key, value) for key, value in metadata)
    for key, value in checked:
        legal = isinstance(value, bytes) if key.endswith("-bin") else isinstance(value, str) and _VALUE.fullmatch(value)
        if not legal or not _KEY.fullmatch(key):
            raise ValueError(f"metadata was invalid: {key!r}")
    return checked


def encode_headers(metadata: Sequence[Metadatum]) -> list[tuple[bytes, bytes]]:
    """Returns initial metadata as HTTP headers."""
    return [(key.encode(), value.encode()) for key, value in _in_text(metadata)]


def encode_message(message: bytes, *, text: bool) -> bytes:
    """Returns the frame of a message."""
    return _to_wire(0, message, text)


def encode_trailers(status: Status, *, text: bool) -> bytes:
    """Returns the frame with the trailers, which ends a response."""
    trailers = [("grpc-status", str(status.code.value[0]))]
    if status.details:
        # Percent-encoded UTF-8, except for printable ASCII other than the percent sign.
        trailers.append(("grpc-message", quote(status.details, safe=_UNQUOTED, errors="replace")))
    trailers += _in_text(status.trailing_metadata)
    block = "".join(f"{key.lower()}: {value}\r\n" for key, value in trailers)
    return _to_wire(_TRAILERS_FLAG, block.encode("ascii"), text)


def _in_text(metadata: Iterable[Metadatum]) -> list[tuple[str, str]]:
    """Returns metadata with binary values in base64."""
    return [(key, base64.b64encode(value).decode() if isinstance(value, bytes) else value) for key, value in metadata]


def _to_wire(flags: int, content: bytes, text: bool) -> bytes:
    frame = _PREFIX.pack(flags, len(content)) + content
    return base64.b64encode(frame) if text else frame
