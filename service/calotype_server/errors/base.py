"""The base of every error that a call can end with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ServiceError",
    "Violation",
]


class ServiceError(Exception):
    """Base of every error that a call can end with.

    Attributes:
        code: Name of the gRPC status code.
        reason: `google.rpc.ErrorInfo.reason`, the class name in UPPER_SNAKE_CASE.
        message: One sentence for people.
        retry_after: Seconds to wait before a retry can succeed; None when unknown or when no retry helps.
        metadata: `google.rpc.ErrorInfo.metadata`, such as the limit that was exceeded.
    """

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self, message: str, *, retry_after: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})


@dataclass(frozen=True, slots=True)
class Violation:
    """One invalid field of a request: its name in the proto and what is wrong with it."""

    field: str
    description: str
