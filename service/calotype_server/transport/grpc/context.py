"""`abort` for the servicer contexts of ports that are not grpc.aio's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AbortMixin"]


class AbortMixin:
    """`abort` and `abort_with_status` of `grpc.aio.ServicerContext`, in terms of the methods that set the status."""

    set_code: Callable[[grpc.StatusCode], None]
    set_details: Callable[[str], None]
    set_trailing_metadata: Callable[[Any], None]
    _abort_error: grpc.aio.AbortError | None = None

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Sets the status and ends the call by raising. As in gRPC, OK becomes UNKNOWN.

        Raises:
            grpc.aio.AbortError: Always.
            grpc.aio.UsageError: The call was aborted before.
        """
        if self._abort_error is not None:
            raise grpc.aio.UsageError("Abort already called!")
        self._abort_error = grpc.aio.AbortError("Locally aborted.")
        if code is grpc.StatusCode.OK:
            code, details = grpc.StatusCode.UNKNOWN, details or "abort() was called with OK."
        if trailing_metadata:
            self.set_trailing_metadata(trailing_metadata)
        self.set_code(code)
        self.set_details(details)
        raise self._abort_error

    async def abort_with_status(self, status: Any) -> NoReturn:
        """Ends the call by raising, as `abort` does."""
        await self.abort(status.code, status.details, status.trailing_metadata)
