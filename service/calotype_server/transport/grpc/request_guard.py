"""Limits of the native port that gRPC itself does not have: calls per host, and a timeout for the request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from calotype_server.transport.net.body import request_too_late, wrong_request_count
from calotype_server.transport.net.credentials import peer_of_call
from calotype_server.transport.net.proxies import NO_PROXIES, TrustedProxies

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from calotype_server.transport.net.call_limits import CallLimiter

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["RequestGuard"]


class RequestGuard:
    """Counts calls by host and reads their requests; `CallInterceptor` applies it to every native call.

    gRPC waits without a timeout for the request of a call that has started, and does not call the handler before it
    arrives. On the wire a single request is a stream of one message, and gRPC calls a handler of request streams at
    once. So the interceptor registers such a handler, which reads the request with a timeout.

    Args:
        call_limiter: Counts the calls of each host.
        seconds: Time for a request to arrive.
        proxies: Trusted proxies, whose calls count for the clients behind them.
    """

    def __init__(self, call_limiter: CallLimiter, seconds: float, proxies: TrustedProxies = NO_PROXIES) -> None:
        self._call_limiter = call_limiter
        self._seconds = seconds
        self._proxies = proxies

    def admit(self, context: Context) -> AbstractContextManager[None]:
        """Counts a call while the block runs; see `CallLimiter.admit`."""
        return self._call_limiter.admit(peer_of_call(context, self._proxies))

    async def receive(self, context: Context) -> Any:
        """Returns the request of a call.

        Raises:
            RequestTooLate: The request did not arrive in time.
            WrongRequestCount: The client sent no request, or several.
        """
        try:
            async with asyncio.timeout(self._seconds):
                request = await context.read()
                if request is grpc.aio.EOF:
                    raise wrong_request_count(0)
                # gRPC sends the end together with the only request, so this does not wait.
                if await context.read() is not grpc.aio.EOF:
                    raise wrong_request_count(2)
        except TimeoutError:
            raise request_too_late(self._seconds) from None
        return request
