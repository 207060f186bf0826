"""Which requests are calls, what surrounds them, and an orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from grpc_status import rpc_status
from sonora.asgi import grpcASGI
from starlette.responses import PlainTextResponse

from calotype_server.api import encoding
from calotype_server.errors import NotReady, ServiceError
from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.observability.events import CallRefused, Observe, ignore
from calotype_server.transport.grpcweb import framing
from calotype_server.transport.grpcweb.call import Call
from calotype_server.transport.grpcweb.framing import Status
from calotype_server.transport.net.call_limits import CallLimiter

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["GrpcWeb"]

_RETRY_SECONDS = 5.0
"""After which a server that stops is likely to be back."""


class GrpcWeb(grpcASGI):  # type: ignore[misc]
    """An ASGI app that answers grpc-web, and a `grpc.Server` to register servicers on.

    Args:
        application: The ASGI app for every other request.
        interceptors: As those of a native server, the outermost first.
        limits: What a peer may take.
        peers: Counts the calls of all ports; None for a count of its own.
        observe: Told of calls that are refused because there are too many.
    """

    def __init__(
        self,
        application: Any,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        limits: PortLimits = PORT_LIMITS,
        peers: CallLimiter | None = None,
        observe: Observe = ignore,
    ) -> None:
        super().__init__(application, enable_cors=False)
        self._interceptors = tuple(interceptors)
        self._limits = limits
        self._peers = peers or CallLimiter(limits.max_calls_per_peer)
        self._observe = observe
        self._calls: set[Call] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False

    @property
    def active_calls(self) -> int:
        """Calls that have not been answered to the end."""
        return len(self._calls)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        text = framing.is_text(scope["headers"])
        if text is None and self._get_rpc_handler(path) is None:
            await self._application(scope, receive, send)
        elif scope["method"] != "POST":
            refusal = PlainTextResponse("A call is a POST.\n", 405, {"allow": "POST"})
            await refusal(scope, receive, send)
        elif text is None:
            # Any other type a page of another origin could send without asking first.
            accepted = ", ".join(framing.ACCEPTED)
            refusal = PlainTextResponse(f"A call has one of these types: {accepted}\n", 415, {"accept-post": accepted})
            await refusal(scope, receive, send)
        else:
            await self._run(Call(path, scope, receive, send, text=text, limits=self._limits))

    async def stop(self, grace: float | None = None) -> None:
        """Refuses new calls; those under way get `grace` seconds to end, and then UNAVAILABLE."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace or 0)
        for call in list(self._calls):
            call.end(_stopping())
        # Each is bounded by the time that a reader has.
        await self._idle.wait()

    async def _run(self, call: Call) -> None:
        self._calls.add(call)
        self._idle.clear()
        if self._stopping:
            call.end(_stopping())
        try:
            with contextlib.ExitStack() as counted:
                try:
                    counted.enter_context(self._peers.admit(call.peer))
                except ServiceError as error:
                    self._observe(CallRefused(error.reason))
                    call.end(_status(error))
                await call.run(self._resolve)
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    async def _resolve(self, details: grpc.HandlerCallDetails) -> Handler | None:
        """Asks the interceptors, and at last the registry."""

        async def ask(index: int, details: grpc.HandlerCallDetails) -> Any:
            if index == len(self._interceptors):
                return next(filter(None, (handler.service(details) for handler in self._handlers)), None)
            return await self._interceptors[index].intercept_service(lambda given: ask(index + 1, given), details)

        handler: Handler | None = await ask(0, details)
        return handler


def _stopping() -> Status:
    return _status(NotReady("The server is stopping.", retry_after=_RETRY_SECONDS))


def _status(error: ServiceError) -> Status:
    return Status(*rpc_status.to_status(encoding.encode_error(error)))
