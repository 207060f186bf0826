"""Ends HTTP/1.1 connections after their next response, so that clients of a draining server connect to another one."""

from __future__ import annotations

from typing import Any

__all__ = ["ClosingMiddleware"]


class ClosingMiddleware:
    """An ASGI middleware that adds `Connection: close` to responses after `begin` was called.

    Args:
        application: The app inside.
    """

    def __init__(self, application: Any) -> None:
        self._application = application
        self._closing = False

    def begin(self) -> None:
        """Ends each connection after the response whose headers are sent next on it."""
        self._closing = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request or WebSocket."""

        async def send_closing(event: Any) -> None:
            if self._closing and event["type"] == "http.response.start":
                event = {**event, "headers": [*event.get("headers", ()), (b"connection", b"close")]}
            await send(event)

        await self._application(scope, receive, send_closing)
