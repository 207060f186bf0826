"""Recognizes grpc-web calls, applies limits and interceptors to them, and stops gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any

from sonora.asgi import grpcASGI
from starlette.responses import PlainTextResponse

from calotype_server.errors import Draining, ServiceError
from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.observability.events import CallRefused, Observe, ignore
from calotype_server.transport.grpc.dispatch import find_handler
from calotype_server.transport.grpcweb import framing
from calotype_server.transport.grpcweb.call import Call, status_of
from calotype_server.transport.net.body import is_encoded
from calotype_server.transport.net.call_limits import CallLimiter

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from calotype_server.transport.grpcweb.framing import Status

    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["GrpcWeb"]

_RETRY_SECONDS = 5.0
"""Time after which a stopping server has probably restarted."""


class GrpcWeb(grpcASGI):  # type: ignore[misc]
    """An ASGI app that answers grpc-web, and a `grpc.Server` to register servicers on.

    Args:
        application: The ASGI app for all other requests.
        interceptors: Of every call, outermost first.
        limits: Sizes and timeouts.
        call_limiter: Counts the calls of a host on all ports; None to count those of this port only.
        observe: Receives an event for each call rejected by the call limiter.
    """

    def __init__(
        self,
        application: Any,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        limits: PortLimits = PORT_LIMITS,
        call_limiter: CallLimiter | None = None,
        observe: Observe = ignore,
    ) -> None:
        super().__init__(application, enable_cors=False)
        self._interceptors = tuple(interceptors)
        self._limits = limits
        self._call_limiter = call_limiter or CallLimiter(limits.max_calls_per_peer)
        self._observe = observe
        self._calls: set[Call] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False

    @property
    def active_calls(self) -> int:
        """Number of calls whose response is not complete."""
        return len(self._calls)

    def has_method(self, path: str) -> bool:
        """Returns whether a path, as /package.Service/Method, is that of a method."""
        return self._get_rpc_handler(path) is not None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        text = framing.is_text(scope["headers"])
        if text is None and not self.has_method(path):
            await self._application(scope, receive, send)
        elif scope["method"] != "POST":
            rejection = PlainTextResponse("Use POST.\n", 405, {"allow": "POST"})
            await rejection(scope, receive, send)
        elif text is None:
            # Pages of other origins could send some other types without a CORS preflight request.
            accepted = ", ".join(framing.ACCEPTED)
            rejection = PlainTextResponse(
                f"Use one of these content types: {accepted}\n", 415, {"accept-post": accepted}
            )
            await rejection(scope, receive, send)
        elif is_encoded(scope):
            rejection = PlainTextResponse(
                "Send the body without Content-Encoding.\n", 415, {"accept-encoding": "identity"}
            )
            await rejection(scope, receive, send)
        else:
            await self._run(Call(path, scope, receive, send, text=text, limits=self._limits))

    async def stop(self, grace: float | None = None) -> None:
        """Rejects new calls. Active calls have `grace` seconds to end; those still active then end with UNAVAILABLE."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace or 0)
        for call in list(self._calls):
            call.end(_stopping_status())
        # The stall timeout bounds this wait.
        await self._idle.wait()

    async def _run(self, call: Call) -> None:
        self._calls.add(call)
        self._idle.clear()
        if self._stopping:
            call.end(_stopping_status())
        try:
            with contextlib.ExitStack() as counted:
                await call.run(self._find_handler, functools.partial(self._admit, call, counted))
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    def _admit(self, call: Call, counted: contextlib.ExitStack) -> None:
        """Counts a call until `counted` is closed."""
        try:
            counted.enter_context(self._call_limiter.admit(call.peer))
        except ServiceError as error:
            self._observe(CallRefused(error.reason))
            raise

    async def _find_handler(self, details: grpc.HandlerCallDetails) -> Handler | None:
        return await find_handler(details, self._interceptors, self._handlers)


def _stopping_status() -> Status:
    return status_of(Draining("The server is stopping.", retry_after=_RETRY_SECONDS))
