"""The client of Calotype, a server that streams an image while a diffusion model denoises it.

Usage::

    from calotype import Client

    with Client("localhost:50051") as client:
        generation = client.generate("a red apple", seed=1)
        for progress in generation:
            print(progress.phase, progress.step, progress.total_steps, progress.preview)
        generation.result().save("apple.png")

`AsyncClient` has the same methods for asyncio, with `async for` and `await`. Other public modules:

- `calotype.testing`: `FakeServer`, a server for your own tests.
- `calotype.notebook`: `show` displays a generation in a notebook.
- `calotype.targets`: converts addresses to gRPC targets.
- `calotype.v1`: the generated protobuf and gRPC code.
"""

from ._async.client import AsyncClient
from ._async.generation import AsyncGeneration
from ._async.group import AsyncGenerationGroup
from ._channel import TLS
from ._errors import (
    Aborted,
    AlreadyExists,
    CalotypeError,
    Cancelled,
    ClientClosed,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    GenerationConsumed,
    InternalError,
    InvalidRequest,
    NotFound,
    OutOfRange,
    Overloaded,
    PermissionDenied,
    StreamIncomplete,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    UnknownError,
    Violation,
)
from ._image import Image
from ._options import (
    DisconnectPolicy,
    Lora,
    Output,
    PreviewMethod,
    Previews,
    Priority,
    PromptSyntax,
    Sigmas,
    Speed,
    TimestepSpacing,
)
from ._sync.client import Client
from ._sync.generation import Generation
from ._sync.group import GenerationGroup
from ._types import (
    GenerationSummary,
    MemberProgress,
    Model,
    Notice,
    Phase,
    Progress,
    Scheduler,
    Size,
    Timings,
)
from ._version import __version__

__all__ = [
    "TLS",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncGeneration",
    "AsyncGenerationGroup",
    "CalotypeError",
    "Cancelled",
    "Client",
    "ClientClosed",
    "DataLoss",
    "DeadlineExceeded",
    "DisconnectPolicy",
    "FailedPrecondition",
    "Generation",
    "GenerationConsumed",
    "GenerationGroup",
    "GenerationSummary",
    "Image",
    "InternalError",
    "InvalidRequest",
    "Lora",
    "MemberProgress",
    "Model",
    "NotFound",
    "Notice",
    "OutOfRange",
    "Output",
    "Overloaded",
    "PermissionDenied",
    "Phase",
    "PreviewMethod",
    "Previews",
    "Priority",
    "Progress",
    "PromptSyntax",
    "Scheduler",
    "Sigmas",
    "Size",
    "Speed",
    "StreamIncomplete",
    "TimestepSpacing",
    "Timings",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownError",
    "Violation",
    "__version__",
]
