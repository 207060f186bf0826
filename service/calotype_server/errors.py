"""Every error that the server knows by name.

```
ServiceError                  has a status code, a reason and a sentence fit for a stranger
├── InvalidRequest            INVALID_ARGUMENT     with all violations
├── NotReady                  UNAVAILABLE          loading or draining
├── UpstreamUnavailable       UNAVAILABLE          of the bridge: no server behind it
├── StateUnavailable          UNAVAILABLE          what was to be kept could not be written
├── Unauthenticated           UNAUTHENTICATED      no key, a wrong one, one that was good once
│   ├── KeyRequired
│   ├── KeyInvalid
│   └── KeyExpired
├── RoleRequired          PERMISSION_DENIED    a good key, but not for this
├── QueueFull                 RESOURCE_EXHAUSTED
├── TooManyCalls              RESOURCE_EXHAUSTED   of one peer at once
├── RequestTooLate            DEADLINE_EXCEEDED    the call began, and its message did not come
├── RateLimited               RESOURCE_EXHAUSTED   the key's own limits
│   ├── RequestsPerMinute
│   ├── PixelStepsPerMinute
│   └── ConcurrentGenerations
├── DeadlineTooShort          DEADLINE_EXCEEDED    refused before any work
├── GenerationNotFound        NOT_FOUND
│   └── OtherReplica                               its id is of another server
├── ImageNotFound             NOT_FOUND            of a generation that runs, or has none
├── RequestIdTaken            ALREADY_EXISTS       used for another request before
├── RequestTooLarge           RESOURCE_EXHAUSTED   its bytes, over HTTP
├── TooManyStreams            RESOURCE_EXHAUSTED   on one WebSocket
├── PreviewMethodUnavailable         FAILED_PRECONDITION  a preview method that this server lacks or forbids
└── GenerationError           one generation ended; the engine goes on
    ├── Cancelled             CANCELLED
    │   └── Abandoned                          nobody has read it for too long
    ├── Draining           UNAVAILABLE          the server is stopping
    ├── OutOfMemory           RESOURCE_EXHAUSTED
    ├── ContentWithheld       FAILED_PRECONDITION  the model's safety checker objects
    ├── NumericalFailure      INTERNAL
    ├── GenerationFailed      INTERNAL
    ├── EngineDead            INTERNAL             the engine does not go on
    └── EngineStalled         INTERNAL             nor does it say so: the process ends
StartupError                  for the operator: what is wrong and what to do about it
├── ModelUnavailable
├── TracingUnavailable
├── StateUnusable
├── KeysUnusable
├── CertificatesUnusable
├── Exposed
└── AddressInUse
```

`str(error)` of a `ServiceError` may reach any caller, so it never holds the text of another exception.
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
    """Base of what a caller may be told.

    Attributes:
        code: Name of the gRPC status code.
        reason: Machine-readable, in UPPER_SNAKE_CASE.
        message: One sentence for people.
        retry_after: Seconds after which trying again makes sense, or None.
        metadata: Facts for programs, such as a limit that was exceeded.
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
    """One thing wrong with a request: the field's name in the proto, and what it should be."""

    field: str
    description: str


class InvalidRequest(ServiceError):
    """The request cannot be carried out as it stands."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = tuple(violations)


class NotReady(ServiceError):
    """The server does not take work now: it is loading its model, or it is about to stop."""

    code = "UNAVAILABLE"
    reason = "NOT_READY"


class UpstreamUnavailable(ServiceError):
    """The server behind a bridge cannot be reached."""

    code = "UNAVAILABLE"
    reason = "UPSTREAM_UNAVAILABLE"


class StateUnavailable(ServiceError):
    """The state folder cannot be written or read; the log says why."""

    code = "UNAVAILABLE"
    reason = "STATE_UNAVAILABLE"


class Unauthenticated(ServiceError):
    """The server does not know who calls."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class KeyRequired(Unauthenticated):
    """The call came without an API key."""

    reason = "KEY_REQUIRED"


class KeyInvalid(Unauthenticated):
    """The call came with something that is no key of this server. What is wrong with it is not told."""

    reason = "KEY_INVALID"


class KeyExpired(Unauthenticated):
    """The key is right, but its time is over."""

    reason = "KEY_EXPIRED"


class RoleRequired(ServiceError):
    """The caller is known, and may not do this."""

    code = "PERMISSION_DENIED"
    reason = "ROLE_REQUIRED"


class QueueFull(ServiceError):
    """The queue has no place left."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"


class TooManyCalls(ServiceError):
    """The peer has as many calls under way as one may have."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_MANY_CALLS"


class RequestTooLate(ServiceError):
    """A call has begun, and its request has not arrived."""

    code = "DEADLINE_EXCEEDED"
    reason = "REQUEST_TOO_LATE"


class RateLimited(ServiceError):
    """The caller has used up what its key allows for now; the reason names the limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RATE_LIMITED"


class RequestsPerMinute(RateLimited):
    """It has begun too many generations in the last minute."""

    reason = "REQUESTS_PER_MINUTE"


class PixelStepsPerMinute(RateLimited):
    """Its generations of the last minute have too many pixels and steps."""

    reason = "PIXEL_STEPS_PER_MINUTE"


class ConcurrentGenerations(RateLimited):
    """Too many of its generations wait or run."""

    reason = "CONCURRENT_GENERATIONS"


class DeadlineTooShort(ServiceError):
    """The caller's deadline would pass before the picture is there."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_TOO_SHORT"


class GenerationNotFound(ServiceError):
    """No generation of that id is known."""

    code = "NOT_FOUND"
    reason = "GENERATION_NOT_FOUND"


class OtherReplica(GenerationNotFound):
    """The generation belongs to another server, or to one that is gone."""

    reason = "OTHER_REPLICA"


class ImageNotFound(ServiceError):
    """The generation is known, but the image that was asked for is not there: not yet, not any more, or never."""

    code = "NOT_FOUND"
    reason = "IMAGE_NOT_FOUND"


class RequestIdTaken(ServiceError):
    """The caller has used that request id for another request."""

    code = "ALREADY_EXISTS"
    reason = "REQUEST_ID_TAKEN"


class RequestTooLarge(ServiceError):
    """The request has more bytes than are read."""

    code = "RESOURCE_EXHAUSTED"
    reason = "REQUEST_TOO_LARGE"


class TooManyStreams(ServiceError):
    """The WebSocket carries as many generations as it may."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_MANY_STREAMS"


class PreviewMethodUnavailable(ServiceError):
    """The preview method is not there, or the operator does not allow it."""

    code = "FAILED_PRECONDITION"
    reason = "PREVIEW_METHOD_UNAVAILABLE"


class GenerationError(ServiceError):
    """One generation ended without its image."""


class Cancelled(GenerationError):
    """The caller cancelled it."""

    code = "CANCELLED"
    reason = "CANCELLED"


class Abandoned(Cancelled):
    """Its last reader left and did not come back in time. Who asks for the same again gets a new generation."""

    reason = "ABANDONED"


class Draining(GenerationError):
    """The server is stopping and could not wait for it."""

    code = "UNAVAILABLE"
    reason = "DRAINING"


class OutOfMemory(GenerationError):
    """The device's memory was not enough."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"


class ContentWithheld(GenerationError):
    """The model's safety checker objects to the picture."""

    code = "FAILED_PRECONDITION"
    reason = "CONTENT_WITHHELD"


class NumericalFailure(GenerationError):
    """The model produced NaN or infinity."""

    reason = "NUMERICAL_FAILURE"


class GenerationFailed(GenerationError):
    """The pipeline raised; the log says what."""

    reason = "GENERATION_FAILED"


class EngineDead(GenerationError):
    """The device is in a state that only a new process cures."""

    reason = "ENGINE_DEAD"


class EngineStalled(GenerationError):
    """It made no progress for so long that the process is ended; the log says where its threads stand."""

    reason = "ENGINE_STALLED"


class StartupError(Exception):
    """The server cannot start; the text tells the operator why, and what to do."""


class ModelUnavailable(StartupError):
    """The model is not there, not reachable, not complete, or not one that Calotype can drive."""


class TracingUnavailable(StartupError):
    """OpenTelemetry is not installed, or lacks the exporter that was asked for."""


class StateUnusable(StartupError):
    """The state folder cannot be used: no permission, another server, a newer version, a damaged file."""


class KeysUnusable(StartupError):
    """The file of API keys cannot be read, or a record in it is wrong."""


class CertificatesUnusable(StartupError):
    """A certificate, its key or an authority cannot be read, or they do not belong together."""


class Exposed(StartupError):
    """Strangers could reach the server: it would listen beyond this machine without TLS or without keys."""


class AddressInUse(StartupError):
    """The address to listen on is taken."""
