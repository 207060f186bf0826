"""Every exception that this package raises on purpose.

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

The first branch is what can happen to a correct program; the second is mistakes in the program itself.
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
    """One thing that is wrong with a request."""

    field: str
    """The argument of `generate`, such as "width" or "previews.every_steps"."""
    description: str
    """What is wrong with it."""


class CalotypeError(Exception):
    """Anything that can happen to a correct program.

    Attributes:
        code: The gRPC status code, such as "UNAVAILABLE".
        message: One sentence for people.
        reason: Machine-readable, in UPPER_SNAKE_CASE, such as QUEUE_FULL. Empty when the server did not say.
        retry_after: Seconds to wait before trying again. None when trying again is unlikely to help.
        metadata: What the server tells besides, by name.
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
    """The server gave up because of a conflict."""

    code = "ABORTED"


class AlreadyExists(CalotypeError):
    """What was to be created exists."""

    code = "ALREADY_EXISTS"


class Cancelled(CalotypeError):
    """The generation was cancelled, by this client or by another."""

    code = "CANCELLED"


class DataLoss(CalotypeError):
    """Data was lost or damaged for good."""

    code = "DATA_LOSS"


class DeadlineExceeded(CalotypeError):
    """The timeout passed, or the server saw early that it could not be met."""

    code = "DEADLINE_EXCEEDED"


class FailedPrecondition(CalotypeError):
    """The server is not set up for this, such as for a preview method that it does not have."""

    code = "FAILED_PRECONDITION"


class InternalError(CalotypeError):
    """The server failed. Its log says why."""

    code = "INTERNAL"


class InvalidRequest(CalotypeError):
    """The request cannot be served as it is; `violations` names everything that is wrong with it.

    Attributes:
        violations: Pairs of argument and description. Empty when the server did not say.
    """

    code = "INVALID_ARGUMENT"

    def __init__(self, message: str = "", *, violations: Iterable[tuple[str, str]] = (), **details: Any) -> None:
        super().__init__(message, **details)
        self.violations = tuple(Violation(*violation) for violation in violations)

    def __str__(self) -> str:
        lines = [f"{field}: {text}" for field, text in self.violations if text not in self.message]
        return "\n  ".join([super().__str__(), *lines])


class NotFound(CalotypeError):
    """There is no such generation, or it ended too long ago."""

    code = "NOT_FOUND"


class OutOfRange(CalotypeError):
    """Something was asked for beyond its end."""

    code = "OUT_OF_RANGE"


class Overloaded(CalotypeError):
    """The queue is full, the memory or what the API key allows is used up; `retry_after` says when to try again."""

    code = "RESOURCE_EXHAUSTED"


class PermissionDenied(CalotypeError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"


class Unauthenticated(CalotypeError):
    """The caller did not prove who it is: no API key, one that is not valid, or one that has expired."""

    code = "UNAUTHENTICATED"


class Unavailable(CalotypeError):
    """No server answers, or it is loading its model or shutting down."""

    code = "UNAVAILABLE"


class Unimplemented(CalotypeError):
    """The server does not know this call: an older Calotype, or another service."""

    code = "UNIMPLEMENTED"


class UnknownError(CalotypeError):
    """An error that does not fit elsewhere."""

    code = "UNKNOWN"


class StreamIncomplete(UnknownError):
    """The stream ended without saying how the generation ended."""


class ClientClosed(RuntimeError):
    """The client was used after it had been closed."""

    def __init__(self) -> None:
        super().__init__("This client has been closed. Make a new one.")


class GenerationConsumed(RuntimeError):
    """The generation was iterated a second time."""

    def __init__(self) -> None:
        super().__init__(
            "A generation can be iterated only once. `result()` and `progress` still work; call `generate` for another."
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
