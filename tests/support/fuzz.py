"""Random malformed requests: messages, calls and HTTP."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from calotype.v1 import calotype_pb2 as pb

if TYPE_CHECKING:
    import random

SERVICE = "/calotype.v1.GenerationService"
METHODS = ("Generate", "Watch", "Cancel", "Finish", "ListGenerations", "GetModel")

_TEXTS = ("", "\x00", "a" * 5000, "\u202e\ud7ff\U0010ffff", "../../etc/passwd", "' OR 1=1 --", "%s%n", "NaN", "{{7*7}}")
_NUMBERS = (0, -1, 1, 7, 63, 2**31 - 1, -(2**31), 10**6)
_REALS = (0.0, -1.0, 1e38, -1e-40, float("nan"), float("inf"), float("-inf"))


def message(chance: random.Random) -> bytes:
    """Returns the bytes of a request: with hostile values, truncated, damaged, or random."""
    kind = chance.randrange(5)
    if kind == 0:
        return chance.randbytes(chance.choice((0, 1, 7, 100, 3000)))
    data = hostile(chance).SerializeToString()
    if kind == 1:
        return data[: chance.randrange(len(data) + 1)]
    if kind == 2 and data:
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 5)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        return bytes(damaged)
    if kind == 3:
        # Unknown fields, and groups that never end.
        return data + chance.choice(
            (b"\xfa\x7f\x03abc", b"\x0b\x0b\x0b", b"\x08" + b"\xff" * 11, b"\x0a\xff\xff\xff\x7f")
        )
    return data


def hostile(chance: random.Random) -> pb.GenerateRequest:
    """Returns a well-formed request with at least one value far out of range."""
    request = pb.GenerateRequest(prompt=chance.choice(_TEXTS), width_px=7)
    for name in ("height_px", "step_count"):
        if chance.random() < 0.5:
            setattr(request, name, chance.choice(_NUMBERS))
    if chance.random() < 0.5:
        request.guidance_scale = chance.choice(_REALS)
    if chance.random() < 0.5:
        request.seed = chance.choice((-1, 2**62, -(2**63)))
    if chance.random() < 0.3:
        request.scheduler = chance.choice(_TEXTS)
    if chance.random() < 0.3:
        request.request_id = chance.choice(_TEXTS)
    if chance.random() < 0.3:
        request.preview.quality, request.preview.max_edge_px = chance.choice(_NUMBERS), chance.choice(_NUMBERS)
        request.preview.min_interval.seconds, request.preview.min_interval.nanos = chance.choice(_NUMBERS), -1
    if chance.random() < 0.3:
        request.on_disconnect = chance.choice(_NUMBERS)  # type: ignore[assignment]
    if chance.random() < 0.3:
        request.output.format = chance.choice(_NUMBERS)  # type: ignore[assignment]
        request.output.quality = chance.choice(_NUMBERS)
    return request


def path(chance: random.Random) -> str:
    """Returns a method path, in most cases of an existing method."""
    odd = (f"{SERVICE}/NoSuchMethod", "/no.Such/Method", "/", "//", f"{SERVICE}/", "/calotype.v1.GenerationService")
    return chance.choice(odd) if chance.random() < 0.1 else f"{SERVICE}/{chance.choice(METHODS)}"


def metadata(chance: random.Random) -> list[tuple[str, str | bytes]]:
    """Returns metadata with valid names and unusual values."""
    pairs: list[tuple[str, str | bytes]] = []
    if chance.random() < 0.3:
        pairs.append(("x-request-id", chance.choice(("", "a" * 300, "~", "  spaces  "))))
    if chance.random() < 0.3:
        pairs.append(("authorization", chance.choice(("", "Bearer", "Bearer " + "x" * 500, "Basic Og=="))))
    if chance.random() < 0.3:
        pairs.append(("odd-bin", chance.randbytes(chance.randrange(200))))
    return pairs


def http(chance: random.Random) -> bytes:
    """Returns bytes for the web port: an HTTP request with at least one fault, or random bytes."""
    if chance.random() < 0.15:
        return chance.randbytes(chance.randint(1, 500))
    body = chance.choice((message(chance), framed(chance), b""))
    headers = {
        "host": chance.choice(
            ("localhost", "localhost", "localhost", "127.0.0.1", "evil.example", "", "[::1", "a:b:c")
        ),
        "content-type": chance.choice(
            ("application/grpc-web+proto", "application/grpc-web-text", "application/grpc", "text/html", "", "\xff")
        ),
        "content-length": chance.choice((str(len(body)), str(len(body)), "0", "-1", "99999999999999999999", "1e3")),
    }
    optional = {
        "origin": chance.choice(("null", "https://evil.example", "http://localhost", "::::")),
        "grpc-timeout": chance.choice(("", "1", "1X", "-1S", "999999999999H", "0m")),
        "transfer-encoding": chance.choice(("chunked", "gzip, chunked", "identity")),
        "expect": "100-continue",
        "upgrade": "websocket",
        "odd-bin": chance.choice(("!!!", "=", "AAA", "A" * 3000)),
        "authorization": chance.choice(("Bearer x", "Bearer", "\x80")),
        "last-event-id": chance.choice(("", "x", "-1", "9" * 400)),
    }
    headers |= {name: value for name, value in optional.items() if chance.random() < 0.2}
    method = chance.choice(("POST", "POST", "POST", "GET", "PUT", "OPTIONS", "HEAD", "DELETE", "BREW", "post"))
    target = chance.choice((path(chance), "/", "/healthz", "/assets/../../etc/passwd", "/%2e%2e/%00", "*", "/\xff"))
    lines = [f"{method} {target} HTTP/{chance.choice(('1.1', '1.1', '1.1', '1.0', '2.0', '9'))}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def framed(chance: random.Random) -> bytes:
    """Returns a grpc-web frame whose flags or length may be wrong."""
    data = message(chance)
    flags = chance.choice((0, 0, 0, 1, 0x80, 0xFF))
    length = chance.choice((len(data), len(data), 0, len(data) + 1, 2**32 - 1))
    return struct.pack(">BI", flags, length) + data


_UPGRADE = {
    "host": "localhost",
    "connection": "upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}
_COMMANDS = (
    b'{"type": "generate", "id": "a", "request": {"prompt": "x"}}',
    b'{"type": "generate", "id": ["a"], "request": 5}',
    b'{"type": "watch", "id": "\\ud800"}',
    b"{",
    b"[]",
    b"\xff\xfe",
    b"",
)


def websocket_upgrade() -> bytes:
    """Returns a valid WebSocket handshake."""
    lines = ["GET /v1/ws HTTP/1.1", *(f"{name}: {value}" for name, value in _UPGRADE.items()), "", ""]
    return "\r\n".join(lines).encode()


def websocket(chance: random.Random) -> list[bytes]:
    """Returns a WebSocket handshake that may be damaged, and what follows after the answer to it."""
    headers = dict(_UPGRADE)
    faults = {
        "upgrade": ("h2c", "websocket, x"),
        "sec-websocket-version": ("12", "x"),
        "sec-websocket-key": ("x", ""),
        "sec-websocket-extensions": (";;", 'permessage-deflate; x="'),
        "sec-websocket-protocol": (",", "\x80", "calotype.bearer.x, calotype.v1"),
        "origin": ("null", "::", "\x80"),
        "content-length": ("0", "5", "-1"),
        "transfer-encoding": ("chunked",),
    }
    for name, values in faults.items():
        if chance.random() < 0.08:
            headers[name] = chance.choice(values)
    target = chance.choice(("/v1/ws",) * 6 + ("/", "/v1/ws?\x80", "/v1/%80", "http://x/v1/ws", "*"))
    line = f"{chance.choice(('GET',) * 6 + ('POST', 'HEAD'))} {target} HTTP/1.1"
    head = "\r\n".join([line, *(f"{name}: {value}" for name, value in headers.items()), "", ""])
    return [head.encode("latin-1"), b"".join(_frame(chance) for _ in range(chance.randint(1, 4)))]


def _frame(chance: random.Random) -> bytes:
    """Returns a WebSocket frame: a command, or one with random flags and content."""
    if chance.random() < 0.5:
        payload, first, masked = chance.choice(_COMMANDS), 0x81, 0x80
    else:
        payload, first = chance.randbytes(chance.randrange(100)), chance.randrange(256)
        masked = chance.choice((0x80, 0x80, 0))
    # The mask is zero, so that it changes nothing.
    return bytes([first, masked | len(payload)]) + bytes(4 if masked else 0) + payload


def http2(chance: random.Random) -> bytes:
    """Returns bytes for the native port: the start of an HTTP/2 connection with faulty frames, or something else."""
    if chance.random() < 0.3:
        return chance.choice((b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", chance.randbytes(200)))
    frames = b"".join(
        _http2_frame(chance.randrange(10), chance.randrange(256), chance.choice((0, 1, 2, 3)), chance.randbytes(30))
        for _ in range(chance.randint(1, 4))
    )
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _http2_frame(4, 0, 0, b"") + frames


def _http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
