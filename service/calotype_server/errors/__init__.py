"""Every error that callers or operators see.

```
ServiceError                      a status code, a reason and a message that is safe to show to any caller
├── InvalidRequest                INVALID_ARGUMENT     lists every violation
├── NotReady                      UNAVAILABLE          loading
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
├── DeadlineExceeded              DEADLINE_EXCEEDED
├── MethodNotFound                UNIMPLEMENTED
├── ServiceNotFound               NOT_FOUND            health checks only
├── RequestStreamUnsupported      UNIMPLEMENTED        grpc-web only
├── WrongRequestCount             UNIMPLEMENTED
├── CompressionUnsupported        UNIMPLEMENTED
├── RequestUnreadable             INTERNAL
├── RateLimited                   RESOURCE_EXHAUSTED   limits of one key
│   ├── RequestsPerMinute
│   ├── PixelStepsPerMinute
│   └── ConcurrentGenerations
├── DeadlineTooShort              DEADLINE_EXCEEDED
├── GenerationNotFound            NOT_FOUND
│   └── OtherReplica
├── GroupNotFound                 NOT_FOUND
├── GroupCancelled                CANCELLED            a new member of a group that was cancelled before
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
    ├── EngineStalled             INTERNAL             the server restarts itself
    ├── EngineCrashed             INTERNAL             the server gave up after repeated crashes
    └── DataLoss                  DATA_LOSS            the stored generation is damaged
StartupError                      for operators: what is wrong and how to fix it
├── AcceleratorUnavailable
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

from calotype_server.errors.base import (
    ServiceError,
    Violation,
)
from calotype_server.errors.generation import (
    Abandoned,
    Cancelled,
    ContentWithheld,
    DataLoss,
    Draining,
    EngineCrashed,
    EngineDead,
    EngineStalled,
    GenerationError,
    GenerationFailed,
    NumericalFailure,
    OutOfMemory,
)
from calotype_server.errors.rejections import (
    CompressionUnsupported,
    ConcurrentGenerations,
    DeadlineExceeded,
    DeadlineTooShort,
    GenerationNotFound,
    GroupCancelled,
    GroupNotFound,
    ImageNotFound,
    InvalidRequest,
    KeyExpired,
    KeyInvalid,
    KeyRequired,
    MethodNotFound,
    NotReady,
    OtherReplica,
    PixelStepsPerMinute,
    PreviewMethodUnavailable,
    QueueFull,
    RateLimited,
    RequestIdTaken,
    RequestsPerMinute,
    RequestStreamUnsupported,
    RequestTooLarge,
    RequestTooLate,
    RequestUnreadable,
    RoleRequired,
    ServiceNotFound,
    StateUnavailable,
    TooManyCalls,
    TooManyStreams,
    Unauthenticated,
    UpstreamUnavailable,
    WrongRequestCount,
)
from calotype_server.errors.startup import (
    AcceleratorUnavailable,
    AddressInUse,
    CertificatesUnusable,
    Exposed,
    KeysUnusable,
    ModelUnavailable,
    StartupError,
    StateUnusable,
    TracingUnavailable,
)

__all__ = [
    "Abandoned",
    "AcceleratorUnavailable",
    "AddressInUse",
    "Cancelled",
    "CertificatesUnusable",
    "CompressionUnsupported",
    "ConcurrentGenerations",
    "ContentWithheld",
    "DataLoss",
    "DeadlineExceeded",
    "DeadlineTooShort",
    "Draining",
    "EngineCrashed",
    "EngineDead",
    "EngineStalled",
    "Exposed",
    "GenerationError",
    "GenerationFailed",
    "GenerationNotFound",
    "GroupCancelled",
    "GroupNotFound",
    "ImageNotFound",
    "InvalidRequest",
    "KeyExpired",
    "KeyInvalid",
    "KeyRequired",
    "KeysUnusable",
    "MethodNotFound",
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
    "RequestStreamUnsupported",
    "RequestTooLarge",
    "RequestTooLate",
    "RequestUnreadable",
    "RequestsPerMinute",
    "RoleRequired",
    "ServiceError",
    "ServiceNotFound",
    "StartupError",
    "StateUnavailable",
    "StateUnusable",
    "TooManyCalls",
    "TooManyStreams",
    "TracingUnavailable",
    "Unauthenticated",
    "UpstreamUnavailable",
    "Violation",
    "WrongRequestCount",
]
