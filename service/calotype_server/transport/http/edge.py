"""Around every HTTP request and WebSocket: bounds on what comes and on readers who take nothing, ids, last resorts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog
from uvicorn.protocols.utils import ClientDisconnected

from calotype_server.errors import RequestTooLarge, RequestTooSlow, ServiceError
from calotype_server.transport.body import Gone, TooLarge, TooSlow, read_body
from calotype_server.transport.http.problems import answer
from calotype_server.transport.request_id import bind_request_id

if TYPE_CHECKING:
    from calotype_server.transport.body import Limits

__all__ = ["Edge"]

_log = structlog.get_logger(__name__)


class Edge:
    """An ASGI middleware through which everything of the HTTP API comes and leaves.

    Args:
        application: What is surrounded.
        limits: What a client may take.
    """

    def __init__(self, application: Any, limits: Limits) -> None:
        self._application = application
        self._limits = limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes one request on."""
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), None)
        exit_ = _Exit(send, self._limits.send_seconds, bind_request_id(given))
        try:
            if scope["type"] == "http":
                receive = await self._with_body(scope, receive)
            await self._application(scope, receive, exit_.send)
        except (Gone, ClientDisconnected):
            return
        except _Refused as refusal:
            await answer(refusal.error)(scope, receive, exit_.send)
        except Exception as error:
            if exit_.stalled:
                # Not finishing makes the server close the connection.
                _log.warning("a reader stalled and was dropped", seconds=self._limits.send_seconds)
            else:
                _log.error("request failed", path=scope["path"], exc_info=error)

    async def _with_body(self, scope: Any, receive: Any) -> Any:
        """Reads the body and returns a `receive` that hands it out, whole."""
        limits = self._limits
        try:
            body = await read_body(scope, receive, most=limits.request_bytes, seconds=limits.body_seconds)
        except TooLarge:
            raise _Refused(RequestTooLarge(f"The request is larger than {limits.request_bytes} bytes.")) from None
        except TooSlow:
            late = f"The request had not arrived after {limits.body_seconds:g} seconds."
            raise _Refused(RequestTooSlow(late)) from None
        whole = {"type": "http.request", "body": body, "more_body": False}
        waiting = [whole]

        async def received() -> Any:
            return waiting.pop() if waiting else await receive()

        return received


class _Refused(Exception):
    def __init__(self, error: ServiceError) -> None:
        super().__init__()
        self.error = error


class _Exit:
    """Where everything leaves.

    Args:
        send: Of ASGI.
        seconds: Time that a client may leave one piece unread.
        request_id: Told in the head of the answer.
    """

    def __init__(self, send: Any, seconds: float, request_id: str) -> None:
        self._send = send
        self._seconds = seconds
        self._request_id = request_id
        self.stalled = False

    async def send(self, event: Any) -> None:
        """Sends one piece."""
        if event["type"] == "http.response.start":
            named = (b"x-request-id", self._request_id.encode("ascii"))
            event = {**event, "headers": [*event.get("headers", ()), named]}
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(event)
        except TimeoutError:
            self.stalled = True
            raise
