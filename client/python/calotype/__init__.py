"""Calotype streams an image while a diffusion model denoises it.

Usage::

    from calotype import Client

    with Client("localhost:50051") as client:
        generation = client.generate("a red apple", seed=1)
        for progress in generation:
            print(progress.phase, progress.step, progress.total_steps, progress.preview)
        generation.result().save("apple.png")

`AsyncClient` has the same surface with `async for` and `await`. `calotype.testing.FakeServer` is a server for tests,
`calotype.notebook.show` displays a generation in a notebook, and `calotype.v1` is the wire.
"""

from ._async_client import AsyncClient
from ._channel import TLS
from ._client import Client
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
from ._generation import AsyncGeneration, Generation
from ._image import Image
from ._options import DisconnectPolicy, Output, PreviewMethod, Previews, Priority
from ._types import GenerationSummary, Model, Notice, Phase, Progress, Timings
from ._version import __version__

__all__ = [
    "TLS",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncGeneration",
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
    "GenerationSummary",
    "Image",
    "InternalError",
    "InvalidRequest",
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
    "StreamIncomplete",
    "Timings",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownError",
    "Violation",
    "__version__",
]
