"""What flows through the server, left to right: a `Job` goes in, events come out. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calotype_server.errors import ServiceError

__all__ = [
    "PORT_LIMITS",
    "Decoding",
    "DeliveryOptions",
    "Denoising",
    "DisconnectPolicy",
    "EncodedImage",
    "EncodingPrompt",
    "Event",
    "Failed",
    "Job",
    "Limits",
    "ModelInfo",
    "Notice",
    "OutputOptions",
    "Phase",
    "Pixels",
    "PortLimits",
    "PreviewMethod",
    "PreviewOptions",
    "PreviewReady",
    "Priority",
    "Queued",
    "StillAlive",
    "Succeeded",
    "Timings",
    "Withdrawn",
]


class Priority(IntEnum):
    """Who goes first; the smaller number."""

    INTERACTIVE = 1
    BATCH = 2


class PreviewMethod(StrEnum):
    """What draws previews."""

    AUTO = "auto"
    """The best that stays within the budget."""
    HEAD = "head"
    """The fitted linear map, see `engine.preview.head`."""
    TINY_VAE = "tiny_vae"
    """A small decoder that the operator configured."""
    FULL_VAE = "full_vae"
    """The model's own decoder."""
    NONE = "none"
    """No previews."""


@dataclass(frozen=True, slots=True)
class PreviewOptions:
    """How previews look and how often they come.

    Attributes:
        every_steps: Shows every nth step at most, from 1. The last step is always shown.
        min_interval: Least seconds between two previews, from 0.
        max_edge: Longer edge at most, in pixels.
        quality: JPEG quality, 1 to 95.
        method: What draws them.
    """

    every_steps: int = 1
    min_interval: float = 0.0
    max_edge: int = 512
    quality: int = 75
    method: PreviewMethod = PreviewMethod.AUTO


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How the final image is written.

    Attributes:
        format: File format.
        quality: Of JPEG, 1 to 95, and WebP, 1 to 100; PNG has none.
        metadata: Whether the parameters are written into the file.
    """

    format: Literal["jpeg", "png", "webp"] = "png"
    quality: int = 90
    metadata: bool = True


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
        preview: What the caller wants to see on the way.
        output: What the caller wants in the end.
        priority: Its rank in the queue.
    """

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    step_count: int
    guidance_scale: float | None
    seed: int
    scheduler: str
    preview: PreviewOptions = PreviewOptions()
    output: OutputOptions = OutputOptions()
    priority: Priority = Priority.INTERACTIVE

    @property
    def pixel_count(self) -> int:
        """Width times height."""
        return self.width * self.height


class DisconnectPolicy(IntEnum):
    """What happens to a generation when its last reader leaves before the end."""

    CANCEL = 1
    KEEP = 2


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """What a caller wants besides the picture.

    Attributes:
        caller: Whose it is; callers share the server evenly.
        deadline: Seconds that the caller waits for the final image at most; None for ever.
        on_disconnect: What happens when the last reader leaves.
        grace: Seconds until a cancel, in which a reader may come back.
        request_id: The caller's name for the request, or "": the same name never starts twice.
        seed_was_drawn: Whether the job's seed is the server's choice.
    """

    caller: str = ""
    deadline: float | None = None
    on_disconnect: DisconnectPolicy = DisconnectPolicy.CANCEL
    grace: float = 0.0
    request_id: str = ""
    seed_was_drawn: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator sets: ceilings, all inclusive; the defaults of previews; and what may draw them."""

    max_pixels: int
    max_step_count: int
    max_prompt_chars: int
    max_preview_edge: int = 1024
    max_preview_quality: int = 95
    preview: PreviewOptions = PreviewOptions()
    preview_methods: frozenset[PreviewMethod] = frozenset(PreviewMethod)


@dataclass(frozen=True, slots=True)
class PortLimits:
    """What a peer may take of a port. Described, one by one, in `settings`."""

    max_request_bytes: int = 64 * 1024
    max_metadata_bytes: int = 16 * 1024
    max_connections: int = 1000
    max_calls_per_peer: int = 256
    request_seconds: float = 10.0
    stall_seconds: float = 20.0
    idle_seconds: float = 300.0
    keepalive_seconds: float = 20.0
    keepalive_timeout_seconds: float = 10.0


PORT_LIMITS = PortLimits()
"""The defaults."""


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
        max_step_counts: The largest number of steps of each scheduler that has one.
        max_prompt_tokens: Tokens that the model reads, special ones included; 0 when unknown.
        device: Such as "cpu" or "cuda:0".
        dtype: Such as "float32".
        preview_methods: What can draw previews of this model.
        max_active: Generations at work at once.
        max_batch_rows: Rows of latents that the denoiser computes together at most; 0 when calls are not joined.
        unbatched_reason: Why calls are not joined, one sentence; empty when they are.
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
    max_step_counts: Mapping[str, int] = field(default_factory=dict)
    preview_methods: tuple[PreviewMethod, ...] = ()
    max_active: int = 1
    max_batch_rows: int = 0
    unbatched_reason: str = ""

    def max_steps(self, scheduler: str, limits: Limits) -> int:
        """Returns the largest number of steps accepted with a scheduler."""
        return min(limits.max_step_count, self.max_step_counts.get(scheduler, limits.max_step_count))


@dataclass(frozen=True, slots=True)
class Pixels:
    """An uncompressed picture: `height` rows of `width` RGB pixels, one byte a channel."""

    width: int
    height: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A complete image file."""

    format: Literal["jpeg", "png", "webp"]
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
    """`step` of `total_steps` are done, 0 at the start; `skipped` previews were due since the last and are lost."""

    step: int
    total_steps: int
    skipped: int = 0
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class PreviewReady:
    """A picture of the predicted x0 of `step`; `skipped` other previews were due since the last and are lost."""

    step: int
    total_steps: int
    pixels: Pixels
    method: PreviewMethod
    skipped: int = 0
    estimated_remaining: float | None = None


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The safety checker objects to the picture: what was shown of it must be taken off every screen."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """The steps are done, all of them or as many as were wanted; the latents are being decoded.

    `batch_rows` are the rows that the denoiser computed together in a step on average, 0 when unknown.
    """

    finished_early: bool = False
    estimated_remaining: float | None = None
    batch_rows: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The end, with the final image."""

    image: EncodedImage
    timings: Timings
    finished_early: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """The end without an image; a cancelled generation is one whose error is `errors.Cancelled`."""

    error: ServiceError
    timings: Timings


@dataclass(frozen=True, slots=True)
class StillAlive:
    """Nothing has happened for so many seconds. Readers are told, who could not tell it from a lost server."""

    seconds: float


Event = Queued | EncodingPrompt | Denoising | PreviewReady | Withdrawn | Decoding | StillAlive | Succeeded | Failed
"""Everything that can happen to a generation. `Succeeded` and `Failed` end it."""
