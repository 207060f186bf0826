"""Surrounds every HTTP request and WebSocket: identifies callers, applies limits, binds log ids, handles errors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog
from uvicorn.protocols.utils import ClientDisconnected

from calotype_server.errors import ServiceError
from calotype_server.observability.events import CallEnded, CallRefused, MessageSent, Observe, ignore
from calotype_server.transport.http.callers import admit
from calotype_server.transport.http.media import reject_coding
from calotype_server.transport.http.methods import as_get
from calotype_server.transport.http.problems import error_response
from calotype_server.transport.net.body import ClientGone, read_body
from calotype_server.transport.net.credentials import peer_of
from calotype_server.transport.net.request_id import bind_request_id, bind_traceparent

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp

    from calotype_server.auth.access import Access
    from calotype_server.limits import PortLimits
    from calotype_server.transport.net.call_limits import CallLimiter

__all__ = ["Contain", "HttpMiddleware"]

_LOGGED_HEADERS = (b"traceparent", b"x-request-id")

_log = structlog.get_logger(__name__)


class Contain:
    """An ASGI middleware that turns exceptions which are not an `Exception` into one, so that the app answers them.

    Args:
        app: The app inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._application = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request or WebSocket."""
        try:
            await self._application(scope, receive, send)
        except (Exception, asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            raise RuntimeError(type(error).__name__) from error


class HttpMiddleware:
    """An ASGI middleware around the whole HTTP API.

    Args:
        application: The app inside.
        access: Checks keys.
        limits: Sizes and timeouts.
        call_limiter: Counts the calls of each host.
        observe: Receives events about requests and messages.
        is_open: Whether a path needs no key.
    """

    def __init__(
        self,
        application: FastAPI,
        access: Access,
        limits: PortLimits,
        call_limiter: CallLimiter,
        observe: Observe = ignore,
        *,
        is_open: Callable[[str], bool],
    ) -> None:
        self._application = application
        self._is_open = is_open
        self._access = access
        self._limits = limits
        self._call_limiter = call_limiter
        self._observe = observe

    @property
    def routes(self) -> list[BaseRoute]:
        """The routes of the app."""
        return self._application.routes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request or WebSocket."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _LOGGED_HEADERS}
        bind_traceparent(headers.get(b"traceparent"))
        transport = "websocket" if scope["type"] == "websocket" else "http"
        request_id = bind_request_id(headers.get(b"x-request-id"))
        sender = _ResponseSender(send, self._limits.stall_seconds, request_id, transport, self._observe)
        scope = as_get(scope)
        try:
            if not self._is_open(scope["path"]):
                admit(self._access, scope)
            with self._call_limiter.admit(peer_of(scope)):
                if scope["type"] == "http":
                    if (rejection := reject_coding(scope)) is not None:
                        await rejection(scope, receive, sender.send)
                        return
                    receive = await self._with_body(scope, receive)
                await self._application(scope, receive, sender.send)
        except (ClientGone, ClientDisconnected):
            return
        except ServiceError as error:
            self._observe(CallRefused(error.reason))
            await error_response(error, scope)(scope, receive, sender.send)
            if scope["type"] == "websocket":
                # The response is sent, but uvicorn logs an error if a WebSocket app returns without accepting.
                raise ClientDisconnected from None
        except Exception as error:
            if sender.stalled:
                # Returning without a final event makes the server close the connection.
                _log.warning("dropped a stalled reader", seconds=self._limits.stall_seconds)
            else:
                _log.error("request failed", path=scope["path"], exc_info=error)
        finally:
            # The router sets the endpoint; there are few, so the metrics stay bounded.
            endpoint = getattr(scope.get("endpoint"), "__name__", "other")
            self._observe(CallEnded(transport, endpoint, sender.status))

    async def _with_body(self, scope: Any, receive: Any) -> Any:
        """Reads the body and returns a `receive` that first returns it as a whole."""
        limits = self._limits
        body = await read_body(scope, receive, max_bytes=limits.max_request_bytes, seconds=limits.request_seconds)
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_with_body() -> Any:
            return pending.pop() if pending else await receive()

        return receive_with_body


class _ResponseSender:
    """Sends the events of a response: adds the request id, counts bytes, and times out.

    Args:
        send: The ASGI send function.
        seconds: Time that a client may leave one event unread.
        request_id: Sent as the header `x-request-id`.
        transport: Its name in the metrics.
        observe: Receives an event for each message.

    Attributes:
        status: HTTP status of the response, as text. 499 as long as there is none, as for a client that disconnected.
        stalled: Whether the client did not read in time.
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
        """Sends one event.

        Raises:
            TimeoutError: The client did not read in time.
        """
        if event["type"] == "http.response.start":
            header = (b"x-request-id", self._request_id.encode("ascii"))
            event = {**event, "headers": [*event.get("headers", ()), header]}
        self._record(event)
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(event)
        except TimeoutError:
            self.stalled = True
            raise

    def _record(self, event: Any) -> None:
        match event["type"]:
            case "http.response.start" | "websocket.http.response.start":
                self.status = str(event["status"])
            case "websocket.accept":
                self.status = "101"
            case _:
                data = event.get("body") or event.get("bytes") or (event.get("text") or "").encode()
                if data:
                    self._observe(MessageSent(self._transport, len(data)))
