"""Around every HTTP request and WebSocket: bounds on what comes and on readers who take nothing, ids, last resorts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog
from uvicorn.protocols.utils import ClientDisconnected

from calotype_server.errors import RequestTooLarge, RequestTooLate, ServiceError
from calotype_server.transport.body import Gone, TooLarge, TooSlow, read_body
from calotype_server.transport.credentials import peer_of
from calotype_server.transport.http.callers import admit
from calotype_server.transport.http.problems import answer
from calotype_server.transport.request_id import bind_request_id

if TYPE_CHECKING:
    from calotype_server.access import Access
    from calotype_server.transport.peers import Peers
    from calotype_server.types import PortLimits

__all__ = ["Edge"]

_log = structlog.get_logger(__name__)


class Edge:
    """An ASGI middleware through which everything of the HTTP API comes and leaves.

    Args:
        application: What is surrounded.
        access: Who may call.
        limits: What a peer may take.
        peers: Counts what each has under way.
    """

    def __init__(self, application: Any, access: Access, limits: PortLimits, peers: Peers) -> None:
        self._application = application
        self._access = access
        self._limits = limits
        self._peers = peers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes one request on."""
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), None)
        exit_ = _Exit(send, self._limits.stall_seconds, bind_request_id(given))
        try:
            admit(self._access, scope)
            with self._peers.admit(peer_of(scope)):
                if scope["type"] == "http":
                    receive = await self._with_body(scope, receive)
                await self._application(scope, receive, exit_.send)
        except (Gone, ClientDisconnected):
            return
        except ServiceError as error:
            await answer(error)(scope, receive, exit_.send)
            if scope["type"] == "websocket":
                # It was answered, but uvicorn takes a return for an oversight and logs it as an error.
                raise ClientDisconnected from None
        except Exception as error:
            if exit_.stalled:
                # Not finishing makes the server close the connection.
                _log.warning("a reader stalled and was dropped", seconds=self._limits.stall_seconds)
            else:
                _log.error("request failed", path=scope["path"], exc_info=error)

    async def _with_body(self, scope: Any, receive: Any) -> Any:
        """Reads the body and returns a `receive` that hands it out, whole."""
        limits = self._limits
        try:
            body = await read_body(scope, receive, most=limits.max_request_bytes, seconds=limits.request_seconds)
        except TooLarge:
            raise RequestTooLarge(f"The request is larger than {limits.max_request_bytes} bytes.") from None
        except TooSlow:
            late = f"The request had not arrived after {limits.request_seconds:g} seconds."
            raise RequestTooLate(late) from None
        whole = {"type": "http.request", "body": body, "more_body": False}
        waiting = [whole]

        async def received() -> Any:
            return waiting.pop() if waiting else await receive()

        return received


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
