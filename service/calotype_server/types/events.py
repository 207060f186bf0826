"""The events of a generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calotype_server.errors import ServiceError
    from calotype_server.types.images import EncodedImage, Pixels
    from calotype_server.types.previews import PreviewMethod

__all__ = [
    "Decoding",
    "Denoising",
    "EncodingPrompt",
    "Event",
    "Failed",
    "Heartbeat",
    "Notice",
    "Noticed",
    "Phase",
    "PreviewReady",
    "Queued",
    "Succeeded",
    "Timings",
    "Withdrawn",
]


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning for the caller that does not end the generation; `reason` is in UPPER_SNAKE_CASE."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that each phase took; None for a phase that the generation did not reach.

    `computed_steps` is the number of denoising steps that the device computed, 0 until denoising is complete.
    """

    queued: float | None = None
    encoding_prompt: float | None = None
    denoising: float | None = None
    decoding: float | None = None
    first_preview: float | None = None
    total: float | None = None
    computed_steps: int = 0


class Phase(IntEnum):
    """Progress of a generation. Phases only move forward; the last three are ends."""

    QUEUED = 1
    ENCODING_PROMPT = 2
    DENOISING = 3
    DECODING = 4
    SUCCEEDED = 5
    FAILED = 6
    CANCELLED = 7

    @property
    def is_end(self) -> bool:
        """Whether this is the last phase of a generation."""
        return self >= Phase.SUCCEEDED


# Every `estimated_remaining` below is in seconds until the final image, None when unknown.


@dataclass(frozen=True, slots=True)
class Queued:
    """The generation waits in the queue. The generation at position 1 starts next."""

    position: int
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class EncodingPrompt:
    """The generation left the queue and encodes its prompt."""

    notices: tuple[Notice, ...] = ()
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class Denoising:
    """`step` of `total_steps` steps are done, 0 at the start; `skipped` previews since the last event are lost."""

    step: int
    total_steps: int
    skipped: int = 0
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class PreviewReady:
    """A preview of `step`, showing the predicted x0; `skipped` previews since the last event are lost."""

    step: int
    total_steps: int
    pixels: Pixels
    method: PreviewMethod
    skipped: int = 0
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class Noticed:
    """Warnings for the caller that were not known when the prompt was encoded."""

    notices: tuple[Notice, ...]


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The safety checker rejected the image. Clients must remove the previews that they show."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Denoising is complete, or was finished early, and the VAE decodes the latents.

    `batch_rows` is the mean number of rows that the denoiser computed together in a step, 0 when unknown.
    `computed_steps` is the number of steps that were computed; the other ones were forecast. `seconds` is the time for
    which the device has decoded already: a second event can correct the time of the first.
    """

    finished_early: bool = False
    estimated_remaining: float | None = None
    batch_rows: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    computed_steps: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The end of a generation that has a final image.

    Not `persisted`: the server keeps its state on disk, but could not write this end. A crash may lose it.
    """

    image: EncodedImage
    timings: Timings
    finished_early: bool = False
    persisted: bool = True


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a generation without an image. A cancelled generation has an `errors.Cancelled`.

    `persisted` as for `Succeeded`.
    """

    error: ServiceError
    timings: Timings
    persisted: bool = True


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """No event for `seconds`. Lets readers tell a quiet server from a dead one."""

    seconds: float


Event = (
    Queued | EncodingPrompt | Denoising | PreviewReady | Noticed | Withdrawn | Decoding | Heartbeat | Succeeded | Failed
)
"""Everything that can happen to a generation. `Succeeded` and `Failed` end it."""
