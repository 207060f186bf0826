"""Reading the body of an HTTP request, bounded in bytes and time."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["Gone", "TooLarge", "TooSlow", "read_body"]


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
