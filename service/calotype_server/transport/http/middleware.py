"""Around every HTTP request and WebSocket: bounds on what comes and on readers who take nothing, ids, last resorts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog
from uvicorn.protocols.utils import ClientDisconnected

from calotype_server.errors import RequestTooLarge, RequestTooLate, ServiceError
from calotype_server.observability.events import CallEnded, CallRefused, MessageSent, Observe, ignore
from calotype_server.transport.http.callers import admit
from calotype_server.transport.http.problems import answer
from calotype_server.transport.net.body import Gone, TooLarge, TooSlow, read_body
from calotype_server.transport.net.credentials import peer_of
from calotype_server.transport.net.request_id import bind_request_id, bind_traceparent

if TYPE_CHECKING:
    from calotype_server.auth.access import Access
    from calotype_server.limits import PortLimits
    from calotype_server.transport.net.call_limits import CallLimiter

__all__ = ["HttpMiddleware"]

_READ = (b"traceparent", b"x-request-id")

_log = structlog.get_logger(__name__)


class HttpMiddleware:
    """An ASGI middleware through which everything of the HTTP API comes and leaves.

    Args:
        application: What is surrounded.
        access: Who may call.
        limits: What a peer may take.
        peers: Counts what each has under way.
        observe: Told of requests and of what is sent.
    """

    def __init__(
        self, application: Any, access: Access, limits: PortLimits, peers: CallLimiter, observe: Observe = ignore
    ) -> None:
        self._application = application
        self._access = access
        self._limits = limits
        self._peers = peers
        self._observe = observe

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes one request on."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _READ}
        bind_traceparent(headers.get(b"traceparent"))
        transport = "websocket" if scope["type"] == "websocket" else "http"
        request_id = bind_request_id(headers.get(b"x-request-id"))
        exit_ = _ResponseSender(send, self._limits.stall_seconds, request_id, transport, self._observe)
        try:
            admit(self._access, scope)
            with self._peers.admit(peer_of(scope)):
                if scope["type"] == "http":
                    receive = await self._with_body(scope, receive)
                await self._application(scope, receive, exit_.send)
        except (Gone, ClientDisconnected):
            return
        except ServiceError as error:
            self._observe(CallRefused(error.reason))
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
        finally:
            # Set by the router; of the few functions that there are.
            endpoint = getattr(scope.get("endpoint"), "__name__", "other")
            self._observe(CallEnded(transport, endpoint, exit_.status))

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


class _ResponseSender:
    """Where everything leaves.

    Args:
        send: Of ASGI.
        seconds: Time that a client may leave one piece unread.
        request_id: Told in the head of the answer.
        transport: Its name in the metrics.
        observe: Told of what is sent.

    Attributes:
        status: Number of the answer's status, as text; 499 while there is none, as for a client who has left.
    """

    def __init__(self, send: Any, seconds: float, request_id: str, transport: str, observe: Observe) -> None:
        self._send = send
        self._seconds = seconds
        self._request_id = request_id
        self._transport = transport
        self._observe = observe
        self.status = "499"
        self.stalled = False

    async def send(self, event: Any) -> None:
        """Sends one piece."""
        if event["type"] == "http.response.start":
            named = (b"x-request-id", self._request_id.encode("ascii"))
            event = {**event, "headers": [*event.get("headers", ()), named]}
        self._count(event)
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(event)
        except TimeoutError:
            self.stalled = True
            raise

    def _count(self, event: Any) -> None:
        match event["type"]:
            case "http.response.start" | "websocket.http.response.start":
                self.status = str(event["status"])
            case "websocket.accept":
                self.status = "101"
            case _:
                data = event.get("body") or event.get("bytes") or (event.get("text") or "").encode()
                if data:
                    self._observe(MessageSent(self._transport, len(data)))
