"""What flows through the server, left to right: a `Job` goes in, events come out. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from calotype_server.errors import ServiceError

__all__ = [
    "Decoding",
    "Denoising",
    "EncodedImage",
    "EncodingPrompt",
    "Event",
    "Failed",
    "Job",
    "Limits",
    "ModelInfo",
    "Notice",
    "Phase",
    "Pixels",
    "PreviewReady",
    "Queued",
    "Succeeded",
    "Timings",
]


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request: validation makes it, and only a `Job` enters the queue.

    Attributes:
        prompt: What to show; not empty.
        negative_prompt: What not to show, or None where the model takes none.
        width: Pixels, a multiple of the model's.
        height: Pixels, likewise.
        step_count: Denoising steps asked of the scheduler, from 1.
        guidance_scale: Classifier-free guidance, or None where the model takes none.
        seed: Of the initial noise, 0 to 2**53 - 1.
        scheduler: Class name of the scheduler, one that the model offers.
    """

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    step_count: int
    guidance_scale: float | None
    seed: int
    scheduler: str

    @property
    def pixel_count(self) -> int:
        """Width times height."""
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Limits:
    """Ceilings that the operator sets, all inclusive."""

    max_pixels: int
    max_step_count: int
    max_prompt_chars: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the loaded model can do and does by default, read from its pipeline.

    Attributes:
        name: As the operator gave it.
        pipeline: Class name of the diffusers pipeline.
        width: Native width in pixels.
        height: Native height in pixels.
        size_multiple: Both sides are multiples of this many pixels.
        step_count: Default denoising steps.
        guidance_scale: Default guidance, or None where the pipeline takes none.
        takes_negative_prompt: Whether the pipeline takes a negative prompt.
        scheduler: Class name of the model's own scheduler.
        schedulers: Class names that a request may name, sorted, the default among them.
        max_prompt_tokens: Tokens that the model reads, special ones included; 0 when unknown.
        device: Such as "cpu" or "cuda:0".
        dtype: Such as "float32".
    """

    name: str
    pipeline: str
    width: int
    height: int
    size_multiple: int
    step_count: int
    guidance_scale: float | None
    takes_negative_prompt: bool
    scheduler: str
    schedulers: tuple[str, ...]
    max_prompt_tokens: int
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Pixels:
    """An uncompressed picture: `height` rows of `width` RGB pixels, one byte a channel."""

    width: int
    height: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A complete image file."""

    format: Literal["jpeg", "png"]
    width: int
    height: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the caller should know although the generation goes on."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that each phase took; None for a phase that was not reached."""

    queued: float | None = None
    encoding_prompt: float | None = None
    denoising: float | None = None
    decoding: float | None = None
    first_preview: float | None = None
    total: float | None = None


class Phase(IntEnum):
    """Where a generation stands. It only moves forward; the last three are ends."""

    QUEUED = 1
    ENCODING_PROMPT = 2
    DENOISING = 3
    DECODING = 4
    SUCCEEDED = 5
    FAILED = 6
    CANCELLED = 7

    @property
    def is_end(self) -> bool:
        """Whether nothing follows."""
        return self >= Phase.SUCCEEDED


@dataclass(frozen=True, slots=True)
class Queued:
    """Waits for its turn; position 1 is the next to start. Estimates are seconds to the final image."""

    position: int
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class EncodingPrompt:
    """Work has begun."""

    notices: tuple[Notice, ...] = ()
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class Denoising:
    """`step` of `total_steps` are done; 0 when the first is about to start."""

    step: int
    total_steps: int
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class PreviewReady:
    """A picture of the predicted x0 of `step`; `skipped` previews were due before it and never rendered."""

    step: int
    total_steps: int
    pixels: Pixels
    skipped: int = 0
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class Decoding:
    """All steps are done; the latents are being decoded."""

    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The end, with the final image."""

    image: EncodedImage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """The end without an image; a cancelled generation is one whose error is `errors.Cancelled`."""

    error: ServiceError
    timings: Timings


Event = Queued | EncodingPrompt | Denoising | PreviewReady | Decoding | Succeeded | Failed
"""Everything that can happen to a generation. `Succeeded` and `Failed` end it."""
