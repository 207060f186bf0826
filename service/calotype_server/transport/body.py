"""Reading the body of an HTTP request, bounded in bytes and time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

__all__ = ["Gone", "Limits", "TooLarge", "TooSlow", "read_body"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may take.

    Attributes:
        request_bytes: Largest message accepted.
        body_seconds: Time to send it.
        send_seconds: Time to read one frame of the answer.
    """

    request_bytes: int = 64 * 1024
    body_seconds: float = 10.0
    send_seconds: float = 20.0


class Gone(Exception):
    """There is nobody left to answer."""


class TooLarge(Exception):
    """The body has more bytes than are accepted."""


class TooSlow(Exception):
    """The body has not arrived in time."""


async def read_body(scope: Any, receive: Any, *, most: int, seconds: float) -> bytes:
    """Reads a body to its end.

    Args:
        scope: Of ASGI.
        receive: Likewise.
        most: Bytes accepted.
        seconds: Time to send them.

    Raises:
        Gone: The client has left.
        TooLarge: It has more bytes, or says that it will have.
        TooSlow: It has not arrived in time.
    """
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    if announced.isdigit() and int(announced) > most:
        raise TooLarge
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(seconds):
            while more:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise Gone
                body += event.get("body", b"")
                more = event.get("more_body", False)
                if len(body) > most:
                    raise TooLarge
    except TimeoutError:
        raise TooSlow from None
    return bytes(body)
