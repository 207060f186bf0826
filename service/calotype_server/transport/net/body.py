"""Reads the body of an HTTP request, with limits on its size and its time to arrive."""

from __future__ import annotations

import asyncio
from typing import Any

from calotype_server.errors import RequestTooLarge, RequestTooLate, WrongRequestCount

__all__ = ["ClientGone", "is_encoded", "read_body", "request_too_late", "wrong_request_count"]


class ClientGone(Exception):
    """The client disconnected, so no answer can be sent."""


def is_encoded(scope: Any) -> bool:
    """Returns whether the body of a request has a `Content-Encoding`, which no port supports."""
    codings = [value.strip().lower() for name, value in scope["headers"] if name == b"content-encoding"]
    return any(coding not in (b"", b"identity") for coding in codings)


async def read_body(
    scope: Any, receive: Any, *, max_bytes: int, seconds: float, max_wire_bytes: int | None = None
) -> bytes:
    """Reads a body to its end.

    Args:
        scope: The ASGI scope.
        receive: The ASGI receive function.
        max_bytes: Largest request, in bytes, as named in the error.
        seconds: Time for the body to arrive.
        max_wire_bytes: Largest body, in bytes, where an encoding makes it larger than the request.

    Raises:
        ClientGone: The client disconnected.
        RequestTooLarge: The body is larger, or its content-length announces that it will be.
        RequestTooLate: The body did not arrive in time.
    """
    limit = max_bytes if max_wire_bytes is None else max_wire_bytes
    too_large = RequestTooLarge(f"The request is larger than {max_bytes} bytes.")
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(seconds):
            while more:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise ClientGone
                body += event.get("body", b"")
                more = event.get("more_body", False)
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise request_too_late(seconds) from None
    return bytes(body)


def request_too_late(seconds: float) -> RequestTooLate:
    """Returns the error for a request that did not arrive within `seconds`."""
    return RequestTooLate(f"The request did not arrive within {seconds:g} seconds.")


def wrong_request_count(count: int) -> WrongRequestCount:
    """Returns the error for a gRPC call with `count` requests to a method that takes one."""
    found = "no request" if count == 0 else "several requests"
    return WrongRequestCount(f"The method takes exactly one request, but the call has {found}.")
