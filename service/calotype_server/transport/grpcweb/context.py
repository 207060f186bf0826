"""The servicer's view of a grpc-web call."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from calotype_server.failpoints import hit
from calotype_server.transport.grpc.context import AbortMixin
from calotype_server.transport.grpcweb.framing import Status, check_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from calotype_server.transport.grpcweb.framing import Metadatum
    from calotype_server.transport.grpcweb.response import Response

__all__ = ["Context"]

_log = structlog.get_logger(__name__)

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Context(AbortMixin, grpc.aio.ServicerContext[Any, Any]):
    """A `grpc.aio.ServicerContext` that behaves like that of a native call, so that one servicer serves both.

    Args:
        response: Sends messages to the client.
        metadata: Of the invocation.
        deadline: On the clock of `time.monotonic`, or None.
        peer: Address of the client in gRPC's notation, such as ipv4:127.0.0.1:4711.
    """

    def __init__(self, response: Response, metadata: tuple[Metadatum, ...], deadline: float | None, peer: str) -> None:
        self._response = response
        self._metadata = metadata
        self._deadline = deadline
        self._peer = peer
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._trailing: tuple[Metadatum, ...] = ()
        self._callbacks: list[Callable[[Any], object]] = []
        self._cancelled = False
        self._done = False
        self.serializer: Callable[[Any], bytes] | None = None
        """Of the method's responses; None if they are bytes."""

    async def read(self) -> Any:
        """Returns EOF: the handler already has the only request."""
        return grpc.aio.EOF

    async def write(self, message: Any) -> None:
        """Sends a message."""
        hit("grpcweb.message")
        if self._abort_error is not None:
            raise self._abort_error
        await self._response.write(message if self.serializer is None else self.serializer(message))

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Sends the headers now instead of with the first message."""
        await self._response.start(check_metadata(initial_metadata))

    def set_code(self, code: grpc.StatusCode | int) -> None:
        """Sets the status code for when the handler returns."""
        self._code = code if isinstance(code, grpc.StatusCode) else _CODES.get(code, grpc.StatusCode.UNKNOWN)

    def set_details(self, details: str) -> None:
        """Sets the text of the status."""
        self._details = details

    def code(self) -> grpc.StatusCode | None:  # type: ignore[override]  # None at first, as in grpc.aio
        """Returns the status code that was set, or None."""
        return self._code

    def details(self) -> str:
        """Returns the text of the status that was set, or ""."""
        return self._details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Sets the metadata to send with the status."""
        self._trailing = check_metadata(trailing_metadata)

    def trailing_metadata(self) -> Any:
        """Returns the metadata to send with the status."""
        return self._trailing

    def invocation_metadata(self) -> Any:
        """Returns the metadata that came with the request."""
        return self._metadata

    def set_compression(self, compression: grpc.Compression) -> None:
        """Does nothing: responses are not compressed."""

    def disable_next_message_compression(self) -> None:
        """Does nothing: responses are not compressed."""

    def peer(self) -> str:
        """Returns the address of the client, or of the proxy in front of this server."""
        return self._peer

    def peer_identities(self) -> Iterable[bytes] | None:
        """Returns None: the port does not authenticate peers by certificate."""
        return None

    def peer_identity_key(self) -> str | None:
        """Returns None: the port does not authenticate peers by certificate."""
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Returns an empty mapping: the port does not authenticate peers by certificate."""
        return {}

    def time_remaining(self) -> float | None:  # type: ignore[override]  # None without a deadline, as in grpc.aio
        """Returns the seconds until the deadline, 0 or more, or None without a deadline."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Calls `callback` with this context when the call ends for any reason."""
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        """Whether the call ended before its handler did."""
        return self._cancelled

    def done(self) -> bool:
        """Whether the call has ended."""
        return self._done

    @property
    def status(self) -> Status:
        """The status that the handler has set so far; OK by default."""
        return Status(self._code or grpc.StatusCode.OK, self._details, self._trailing)

    def finish(self, *, cancelled: bool) -> None:
        """Marks the call as ended and runs the done callbacks.

        Args:
            cancelled: Whether the call ended before its handler did.
        """
        self._cancelled = cancelled
        self._done = True
        for callback in self._callbacks:
            try:
                callback(self)
            except Exception:
                _log.exception("a done callback failed")
