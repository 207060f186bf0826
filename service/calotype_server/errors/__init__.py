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
    ├── EngineStalled             INTERNAL             the server restarts itself
    ├── EngineCrashed             INTERNAL             the server gave up after repeated crashes
    └── DataLoss                  DATA_LOSS            the stored generation is damaged
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
    ConcurrentGenerations,
    DeadlineTooShort,
    GenerationNotFound,
    ImageNotFound,
    InvalidRequest,
    KeyExpired,
    KeyInvalid,
    KeyRequired,
    NotReady,
    OtherReplica,
    PixelStepsPerMinute,
    PreviewMethodUnavailable,
    QueueFull,
    RateLimited,
    RequestIdTaken,
    RequestsPerMinute,
    RequestTooLarge,
    RequestTooLate,
    RoleRequired,
    StateUnavailable,
    TooManyCalls,
    TooManyStreams,
    Unauthenticated,
    UpstreamUnavailable,
)
from calotype_server.errors.startup import (
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
    "AddressInUse",
    "Cancelled",
    "CertificatesUnusable",
    "ConcurrentGenerations",
    "ContentWithheld",
    "DataLoss",
    "DeadlineTooShort",
    "Draining",
    "EngineCrashed",
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
