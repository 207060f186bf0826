"""The part of a browser's EventSource that reconnects, as the WHATWG specifies it, without its delays.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx_sse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import httpx

__all__ = ["EventSource"]


class EventSource:
    """Reads events over as many connections as the server demands.

    Args:
        client: Sends the requests. The test may replace it before a reconnect, as after a restart of the server.
        path: Of the stream.
        before_reconnect: Awaited instead of the delay.
        params: The query.

    Attributes:
        client: As given.
        statuses: HTTP status of each connection.
        retry: Delay before a reconnect, in milliseconds, as last set by the server.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        path: str,
        before_reconnect: Callable[[], Awaitable[object]],
        **params: Any,
    ) -> None:
        self.client = client
        self.statuses: list[int] = []
        self.retry: int | None = None
        self._path = path
        self._params = params
        self._before_reconnect = before_reconnect
        self._last_id = ""

    async def __aiter__(self) -> AsyncIterator[httpx_sse.ServerSentEvent]:
        """Yields all events until the server answers with another status than 200."""
        while True:
            headers = {"accept": "text/event-stream", "cache-control": "no-store"}
            if self._last_id:
                headers["last-event-id"] = self._last_id
            async with self.client.stream("GET", self._path, params=self._params, headers=headers) as response:
                self.statuses.append(response.status_code)
                if response.status_code != 200:
                    return
                async for event in httpx_sse.EventSource(response).aiter_sse():
                    self._last_id = event.id or self._last_id
                    self.retry = event.retry or self.retry
                    yield event
            await self._before_reconnect()
