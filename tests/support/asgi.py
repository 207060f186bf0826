"""A client of an ASGI app that reads only when the test allows it, without socket buffers that would hide a stall."""

from __future__ import annotations

import asyncio
from typing import Any


class AsgiClient:
    """Sends one request, or opens a WebSocket, and receives events while `reading` is set.

    Args:
        application: The ASGI app.
        kind: "http" or "websocket".
        path: Of the request.
        method: HTTP method.
        query: Query string, without the question mark.
        body: Of the request.
        headers: Of the request, in addition to host.
    """

    def __init__(
        self,
        application: Any,
        kind: str,
        path: str,
        *,
        method: str = "POST",
        query: bytes = b"",
        body: bytes = b"",
        headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),),
    ) -> None:
        self.reading = asyncio.Event()
        self.reading.set()
        self.received: list[dict[str, Any]] = []
        self.waiting = asyncio.Event()
        """Set while the app waits for this client to read."""
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        if kind == "http":
            self.push({"type": "http.request", "body": body, "more_body": False})
        else:
            self.push({"type": "websocket.connect"})
        scope = {
            "type": kind,
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": [(b"host", b"localhost"), *headers],
            "client": ("127.0.0.1", 4711),
            "scheme": "http",
            "http_version": "1.1",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "subprotocols": [],
        }
        self.done = asyncio.ensure_future(application(scope, self._incoming.get, self._send))

    def push(self, event: dict[str, Any]) -> None:
        """Sends an event to the app."""
        self._incoming.put_nowait(event)

    def disconnect(self) -> None:
        """Disconnects from the app."""
        self.push({"type": "http.disconnect"})
        self.push({"type": "websocket.disconnect", "code": 1006})

    async def _send(self, event: dict[str, Any]) -> None:
        if not self.reading.is_set():
            self.waiting.set()
        await self.reading.wait()
        self.waiting.clear()
        self.received.append(event)
        await asyncio.sleep(0)
