"""Every error that callers or operators see.

```
ServiceError                      a status code, a reason and a message that is safe to show to any caller
├── InvalidRequest                INVALID_ARGUMENT     lists every violation
├── NotReady                      UNAVAILABLE
├── UpstreamUnavailable           UNAVAILABLE          sent by the bridge
├── StateUnavailable              UNAVAILABLE
├── Unauthenticated               UNAUTHENTICATED
│   ├── KeyRequired
│   ├── KeyInvalid
│   └── KeyExpired
├── RoleRequired                  PERMISSION_DENIED
├── QueueFull                     RESOURCE_EXHAUSTED
├── TooManyCalls                  RESOURCE_EXHAUSTED   limit per host
├── RequestTooLate                DEADLINE_EXCEEDED
├── RateLimited                   RESOURCE_EXHAUSTED   limits of one key
│   ├── RequestsPerMinute
│   ├── PixelStepsPerMinute
│   └── ConcurrentGenerations
├── DeadlineTooShort              DEADLINE_EXCEEDED
├── GenerationNotFound            NOT_FOUND
│   └── OtherReplica
├── ImageNotFound                 NOT_FOUND
├── RequestIdTaken                ALREADY_EXISTS
├── RequestTooLarge               RESOURCE_EXHAUSTED   HTTP only
├── TooManyStreams                RESOURCE_EXHAUSTED   WebSocket only
├── PreviewMethodUnavailable      FAILED_PRECONDITION
└── GenerationError               one generation ended without an image
    ├── Cancelled                 CANCELLED
    │   └── Abandoned
    ├── Draining                  UNAVAILABLE
    ├── OutOfMemory               RESOURCE_EXHAUSTED
    ├── ContentWithheld           FAILED_PRECONDITION
    ├── NumericalFailure          INTERNAL
    ├── GenerationFailed          INTERNAL
    ├── EngineDead                INTERNAL             the server needs a restart
    └── EngineStalled             INTERNAL             the server restarts itself
StartupError                      for operators: what is wrong and how to fix it
├── ModelUnavailable
├── TracingUnavailable
├── StateUnusable
├── KeysUnusable
├── CertificatesUnusable
├── Exposed
└── AddressInUse
```

Each class is named after its reason: `QueueFull` has the reason `QUEUE_FULL`. The message of a `ServiceError` can reach
any caller, so it never contains the text of another exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Abandoned",
    "AddressInUse",
    "Cancelled",
    "CertificatesUnusable",
    "ConcurrentGenerations",
    "ContentWithheld",
    "DeadlineTooShort",
    "Draining",
    "EngineDead",
    "EngineStalled",
    "Exposed",
    "GenerationError",
    "GenerationFailed",
    "GenerationNotFound",
    "ImageNotFound",
    "InvalidRequest",
    "KeyExpired",
    "KeyInvalid",
    "KeyRequired",
    "KeysUnusable",
    "ModelUnavailable",
    "NotReady",
    "NumericalFailure",
    "OtherReplica",
    "OutOfMemory",
    "PixelStepsPerMinute",
    "PreviewMethodUnavailable",
    "QueueFull",
    "RateLimited",
    "RequestIdTaken",
    "RequestTooLarge",
    "RequestTooLate",
    "RequestsPerMinute",
    "RoleRequired",
    "ServiceError",
    "StartupError",
    "StateUnavailable",
    "StateUnusable",
    "TooManyCalls",
    "TooManyStreams",
    "TracingUnavailable",
    "Unauthenticated",
    "UpstreamUnavailable",
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


class InvalidRequest(ServiceError):
    """The request is malformed or asks for something outside the limits. Lists every violation at once."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = tuple(violations)


class NotReady(ServiceError):
    """The server accepts no new work because it is loading its model or shutting down."""

    code = "UNAVAILABLE"
    reason = "NOT_READY"


class UpstreamUnavailable(ServiceError):
    """The bridge cannot reach any server behind it."""

    code = "UNAVAILABLE"
    reason = "UPSTREAM_UNAVAILABLE"


class StateUnavailable(ServiceError):
    """The server cannot read or write its state folder at the moment. The log has the cause."""

    code = "UNAVAILABLE"
    reason = "STATE_UNAVAILABLE"


class Unauthenticated(ServiceError):
    """Base of the errors of callers that the server cannot identify."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class KeyRequired(Unauthenticated):
    """The server requires an API key and the call has none."""

    reason = "KEY_REQUIRED"


class KeyInvalid(Unauthenticated):
    """The call has an API key that the server does not know. The message does not say which part is wrong."""

    reason = "KEY_INVALID"


class KeyExpired(Unauthenticated):
    """The API key is correct but has expired."""

    reason = "KEY_EXPIRED"


class RoleRequired(ServiceError):
    """The key is valid but lacks the role that the method requires."""

    code = "PERMISSION_DENIED"
    reason = "ROLE_REQUIRED"


class QueueFull(ServiceError):
    """The queue, or the caller's share of it, is full."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"


class TooManyCalls(ServiceError):
    """The caller's host already has the maximum number of open calls."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_MANY_CALLS"


class RequestTooLate(ServiceError):
    """The client opened a call but did not send its request in time."""

    code = "DEADLINE_EXCEEDED"
    reason = "REQUEST_TOO_LATE"


class RateLimited(ServiceError):
    """Base of the errors of callers that exceed a limit of their key. The reason names the limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RATE_LIMITED"


class RequestsPerMinute(RateLimited):
    """The key started too many generations in the last minute."""

    reason = "REQUESTS_PER_MINUTE"


class PixelStepsPerMinute(RateLimited):
    """The key's generations of the last minute used too many pixel steps (width times height times steps)."""

    reason = "PIXEL_STEPS_PER_MINUTE"


class ConcurrentGenerations(RateLimited):
    """The key already has the maximum number of queued and running generations."""

    reason = "CONCURRENT_GENERATIONS"


class DeadlineTooShort(ServiceError):
    """The server rejects the request at once because the call's deadline would pass before the image is finished."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_TOO_SHORT"


class GenerationNotFound(ServiceError):
    """No generation with this id exists, or it belongs to another caller."""

    code = "NOT_FOUND"
    reason = "GENERATION_NOT_FOUND"


class OtherReplica(GenerationNotFound):
    """The generation belongs to another server, which may be gone."""

    reason = "OTHER_REPLICA"


class ImageNotFound(ServiceError):
    """The generation exists, but the requested image does not exist yet, was discarded, or was never made."""

    code = "NOT_FOUND"
    reason = "IMAGE_NOT_FOUND"


class RequestIdTaken(ServiceError):
    """The caller already used this request id with different parameters."""

    code = "ALREADY_EXISTS"
    reason = "REQUEST_ID_TAKEN"


class RequestTooLarge(ServiceError):
    """The HTTP request body is larger than the limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "REQUEST_TOO_LARGE"


class TooManyStreams(ServiceError):
    """The WebSocket already carries the maximum number of generations."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_MANY_STREAMS"


class PreviewMethodUnavailable(ServiceError):
    """The server does not have the requested preview method, or the operator does not allow it."""

    code = "FAILED_PRECONDITION"
    reason = "PREVIEW_METHOD_UNAVAILABLE"


class GenerationError(ServiceError):
    """Base of the errors that end one generation without an image."""


class Cancelled(GenerationError):
    """The caller cancelled the generation."""

    code = "CANCELLED"
    reason = "CANCELLED"


class Abandoned(Cancelled):
    """The last reader disconnected and did not return in time. A retry of the same request starts a new generation."""

    reason = "ABANDONED"


class Draining(GenerationError):
    """The server shut down before the generation finished."""

    code = "UNAVAILABLE"
    reason = "DRAINING"


class OutOfMemory(GenerationError):
    """The device, or the host, ran out of memory."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"


class ContentWithheld(GenerationError):
    """The model's safety checker rejected the image."""

    code = "FAILED_PRECONDITION"
    reason = "CONTENT_WITHHELD"


class NumericalFailure(GenerationError):
    """The model produced NaN or infinity."""

    reason = "NUMERICAL_FAILURE"


class GenerationFailed(GenerationError):
    """The pipeline raised an unexpected exception. The log has it."""

    reason = "GENERATION_FAILED"


class EngineDead(GenerationError):
    """The device is in a state that only a new process can fix."""

    reason = "ENGINE_DEAD"


class EngineStalled(GenerationError):
    """The generation made no progress for so long that the process exits. The log has the stack of every thread."""

    reason = "ENGINE_STALLED"


class StartupError(Exception):
    """The server cannot start. The message explains to the operator why, and how to fix it."""


class ModelUnavailable(StartupError):
    """The model is missing, unreachable, incomplete, or of a kind that Calotype does not support."""


class TracingUnavailable(StartupError):
    """OpenTelemetry, or the exporter that the operator chose, is not installed."""


class StateUnusable(StartupError):
    """The state folder cannot be used: missing permission, used by another server, newer version, or damaged."""


class KeysUnusable(StartupError):
    """The file of API keys cannot be read, or contains an invalid record."""


class CertificatesUnusable(StartupError):
    """A certificate, its key or a CA cannot be read, or the key does not belong to the certificate."""


class Exposed(StartupError):
    """The server would listen on a public address without TLS or without API keys."""


class AddressInUse(StartupError):
    """The address to listen on is already in use."""
