"""The exceptions of this package, with the gRPC status code of each.

::

    Exception
    ├── CalotypeError
    │   ├── Aborted             ABORTED
    │   ├── AlreadyExists       ALREADY_EXISTS
    │   ├── Cancelled           CANCELLED
    │   ├── DataLoss            DATA_LOSS
    │   ├── DeadlineExceeded    DEADLINE_EXCEEDED
    │   ├── FailedPrecondition  FAILED_PRECONDITION
    │   ├── InternalError       INTERNAL
    │   ├── InvalidRequest      INVALID_ARGUMENT
    │   ├── NotFound            NOT_FOUND
    │   ├── OutOfRange          OUT_OF_RANGE
    │   ├── Overloaded          RESOURCE_EXHAUSTED
    │   ├── PermissionDenied    PERMISSION_DENIED
    │   ├── Unauthenticated     UNAUTHENTICATED
    │   ├── Unavailable         UNAVAILABLE
    │   ├── Unimplemented       UNIMPLEMENTED
    │   └── UnknownError        UNKNOWN
    │       └── StreamIncomplete
    └── RuntimeError
        ├── ClientClosed
        └── GenerationConsumed

A `CalotypeError` can happen to a correct program, for example because the server is down. The other two report a
mistake in the program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "BY_CODE",
    "Aborted",
    "AlreadyExists",
    "CalotypeError",
    "Cancelled",
    "ClientClosed",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "GenerationConsumed",
    "InternalError",
    "InvalidRequest",
    "NotFound",
    "OutOfRange",
    "Overloaded",
    "PermissionDenied",
    "StreamIncomplete",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownError",
    "Violation",
]


class Violation(NamedTuple):
    """One invalid argument of a request."""

    field: str
    """The argument, such as "width" or "previews.every_steps"."""
    description: str
    """Why its value is invalid, such as "is 7, must be a multiple of 8"."""


class CalotypeError(Exception):
    """A call or a generation failed. Base class of all errors that a correct program has to handle.

    Attributes:
        code: The gRPC status code, such as "UNAVAILABLE".
        message: One sentence for people.
        reason: Reason for programs, in UPPER_SNAKE_CASE, such as QUEUE_FULL. Empty when the server sent none.
        retry_after: Seconds to wait before trying again. None when trying again is unlikely to help.
        metadata: Further details from the server, by name, such as a limit that the request exceeds.
    """

    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str = "",
        *,
        reason: str = "",
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.retry_after = retry_after
        self.metadata: dict[str, str] = dict(metadata or {})

    def __str__(self) -> str:
        return self.message or self.reason or self.code


class Aborted(CalotypeError):
    """The server aborted the call because of a conflict with another one."""

    code = "ABORTED"


class AlreadyExists(CalotypeError):
    """The request id belongs to another request."""

    code = "ALREADY_EXISTS"


class Cancelled(CalotypeError):
    """The generation was cancelled, by this client or another one."""

    code = "CANCELLED"


class DataLoss(CalotypeError):
    """The stored generation is damaged. With another request id, the same seed makes the same image again."""

    code = "DATA_LOSS"


class DeadlineExceeded(CalotypeError):
    """The timeout passed, or the server rejected the request because it cannot meet the timeout."""

    code = "DEADLINE_EXCEEDED"


class FailedPrecondition(CalotypeError):
    """The server cannot do this in its current setup; for example, it lacks a preview method."""

    code = "FAILED_PRECONDITION"


class InternalError(CalotypeError):
    """The server failed. Its log has the cause.

    With the reason ENGINE_CRASHED, the generation ended the server's process on every attempt. The same request id gets
    the same end, so the client does not send the request again.
    """

    code = "INTERNAL"


class InvalidRequest(CalotypeError):
    """The request is invalid. `violations` lists every invalid argument.

    Attributes:
        violations: One `Violation` for each invalid argument. Empty when the server sent none.
    """

    code = "INVALID_ARGUMENT"

    def __init__(self, message: str = "", *, violations: Iterable[tuple[str, str]] = (), **details: Any) -> None:
        super().__init__(message, **details)
        self.violations = tuple(Violation(*violation) for violation in violations)

    def __str__(self) -> str:
        lines = [f"{field}: {text}" for field, text in self.violations if text not in self.message]
        return "\n  ".join([super().__str__(), *lines])


class NotFound(CalotypeError):
    """The server does not know the generation, or no longer knows it because it ended a while ago."""

    code = "NOT_FOUND"


class OutOfRange(CalotypeError):
    """The request is outside the valid range. No current method of the server raises this."""

    code = "OUT_OF_RANGE"


class Overloaded(CalotypeError):
    """The queue or the memory is full, or the API key's quota is used up. `retry_after` says when to try again."""

    code = "RESOURCE_EXHAUSTED"


class PermissionDenied(CalotypeError):
    """The API key is valid, but does not permit this."""

    code = "PERMISSION_DENIED"


class Unauthenticated(CalotypeError):
    """The API key is missing, invalid or expired."""

    code = "UNAUTHENTICATED"


class Unavailable(CalotypeError):
    """No server can be reached, or the server is loading its model or shutting down."""

    code = "UNAVAILABLE"


class Unimplemented(CalotypeError):
    """The server does not have this method: it is an older version, or another service."""

    code = "UNIMPLEMENTED"


class UnknownError(CalotypeError):
    """An error of unknown kind."""

    code = "UNKNOWN"


class StreamIncomplete(UnknownError):
    """The stream ended before the end of the generation, for example because a proxy cut it."""


class ClientClosed(RuntimeError):
    """The client was used after it was closed."""

    def __init__(self) -> None:
        super().__init__("This client is closed. Make a new one.")


class GenerationConsumed(RuntimeError):
    """The generation was iterated twice."""

    def __init__(self) -> None:
        super().__init__(
            "A generation can be iterated only once. Use `result()` or `progress`, or start another generation."
        )


BY_CODE: dict[int, type[CalotypeError]] = {
    1: Cancelled,
    2: UnknownError,
    3: InvalidRequest,
    4: DeadlineExceeded,
    5: NotFound,
    6: AlreadyExists,
    7: PermissionDenied,
    8: Overloaded,
    9: FailedPrecondition,
    10: Aborted,
    11: OutOfRange,
    12: Unimplemented,
    13: InternalError,
    14: Unavailable,
    15: DataLoss,
    16: Unauthenticated,
}
