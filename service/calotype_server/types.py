"""The values that flow through the server: a `Job` goes in, events come out. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calotype_server.errors import ServiceError

__all__ = [
    "RENDERED_PREVIEW_METHODS",
    "Decoding",
    "DeliveryOptions",
    "Denoising",
    "DisconnectPolicy",
    "EncodedImage",
    "EncodingPrompt",
    "Event",
    "Failed",
    "Heartbeat",
    "ImageFormat",
    "Job",
    "ModelInfo",
    "Notice",
    "OutputOptions",
    "Phase",
    "Pixels",
    "PreviewMethod",
    "PreviewOptions",
    "PreviewReady",
    "Priority",
    "Queued",
    "Succeeded",
    "Timings",
    "Withdrawn",
]

ImageFormat: TypeAlias = Literal["jpeg", "png", "webp"]
"""File format of an image."""


class Priority(IntEnum):
    """Rank in the queue: smaller numbers start first."""

    INTERACTIVE = 1
    BATCH = 2


class PreviewMethod(StrEnum):
    """How previews are rendered."""

    AUTO = "auto"
    """The best method that stays within the preview budget."""
    HEAD = "head"
    """A linear map fitted to the model at load, see `engine.preview.head`."""
    TINY_VAE = "tiny_vae"
    """A small decoder that the operator configured."""
    FULL_VAE = "full_vae"
    """The model's own decoder."""
    NONE = "none"
    """No previews."""


RENDERED_PREVIEW_METHODS = (PreviewMethod.HEAD, PreviewMethod.TINY_VAE, PreviewMethod.FULL_VAE)
"""The methods that render, cheapest first; AUTO chooses one of them."""


@dataclass(frozen=True, slots=True)
class PreviewOptions:
    """Size and frequency of previews.

    Attributes:
        every_steps: Steps between two previews, 1 to 1000. The last step always has one.
        min_interval: Minimum seconds between two previews, 0 to 60.
        max_edge: Maximum length of the longer edge, in pixels, at least 16.
        quality: JPEG quality, 1 to 95.
        method: How previews are rendered.
    """

    every_steps: int = 1
    min_interval: float = 0.0
    max_edge: int = 512
    quality: int = 75
    method: PreviewMethod = PreviewMethod.AUTO


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """File format of the final image.

    Attributes:
        format: File format.
        quality: 1 to 95 for JPEG, 1 to 100 for WebP; ignored for PNG.
        metadata: Whether the file contains the parameters of the generation.
    """

    format: ImageFormat = "png"
    quality: int = 90
    metadata: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request. Only validation creates jobs, and only jobs enter the queue.

    Attributes:
        prompt: Text to draw; not empty.
        negative_prompt: Text to avoid, or None when absent or when the model does not support it.
        width: Pixels, a multiple of `ModelInfo.size_multiple`.
        height: Pixels, a multiple of `ModelInfo.size_multiple`.
        step_count: Denoising steps, at least 1.
        guidance_scale: Classifier-free guidance, 0 to 100, or None when the model does not support it.
        seed: Seed of the initial noise, 0 to 2**53 - 1.
        scheduler: Class name of the scheduler, one of `ModelInfo.schedulers`.
        preview: Options of the previews.
        output: Options of the final image.
        priority: Rank in the queue.
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
    """What happens to a generation when its last reader disconnects before the end."""

    CANCEL = 1
    KEEP = 2


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """Everything in a request that does not affect the image.

    Attributes:
        caller: Id of the owner, see `auth.access.Caller.id`. Callers share the server evenly.
        deadline: Maximum seconds until the final image; None for no deadline.
        on_disconnect: What happens when the last reader disconnects.
        grace: Seconds, 0 to 3600, between the last disconnect and the cancel. A reader that returns stops the timer.
        request_id: The caller's own id of the request, or "". The same id never starts two generations.
        seed_was_drawn: Whether the server chose the seed.
    """

    caller: str = ""
    deadline: float | None = None
    on_disconnect: DisconnectPolicy = DisconnectPolicy.CANCEL
    grace: float = 0.0
    request_id: str = ""
    seed_was_drawn: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Abilities and defaults of the loaded model, read from its pipeline.

    Attributes:
        name: The value of `--model`.
        pipeline: Class name of the diffusers pipeline.
        width: Native width in pixels.
        height: Native height in pixels.
        size_multiple: Width and height must be multiples of this number of pixels.
        step_count: Default number of denoising steps.
        guidance_scale: Default guidance, or None when the pipeline does not support it.
        takes_negative_prompt: Whether the pipeline supports a negative prompt.
        scheduler: Class name of the default scheduler.
        schedulers: Class names that requests may choose, sorted; they include the default.
        max_step_counts: Maximum number of steps, for each scheduler that has one.
        max_prompt_tokens: Tokens that the text encoder reads, including special ones; 0 when unknown.
        device: Torch device, such as "cpu" or "cuda:0".
        dtype: Number format of the weights, such as "float32".
        preview_methods: Methods that can render previews of this model.
        max_active: Generations that run at the same time.
        max_batch_rows: Maximum rows of latents in one call of the denoiser; 0 when it does not batch requests.
        unbatched_reason: One sentence why the denoiser does not batch requests; empty when it does.
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

    def max_steps(self, scheduler: str, ceiling: int) -> int:
        """Returns the maximum number of steps with this scheduler, at most `ceiling`."""
        return min(ceiling, self.max_step_counts.get(scheduler, ceiling))


@dataclass(frozen=True, slots=True)
class Pixels:
    """An uncompressed image: `height` rows of `width` RGB pixels, one byte per channel."""

    width: int
    height: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A complete image file; width and height are in pixels."""

    format: ImageFormat
    width: int
    height: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning for the caller that does not end the generation; `reason` is in UPPER_SNAKE_CASE."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that each phase took; None for a phase that the generation did not reach."""

    queued: float | None = None
    encoding_prompt: float | None = None
    denoising: float | None = None
    decoding: float | None = None
    first_preview: float | None = None
    total: float | None = None


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
class Withdrawn:
    """The safety checker rejected the image. Clients must remove the previews that they show."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Denoising is complete, or was finished early, and the VAE decodes the latents.

    `batch_rows` is the mean number of rows that the denoiser computed together in a step, 0 when unknown.
    """

    finished_early: bool = False
    estimated_remaining: float | None = None
    batch_rows: float = field(default=0.0, compare=False)


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


Event = Queued | EncodingPrompt | Denoising | PreviewReady | Withdrawn | Decoding | Heartbeat | Succeeded | Failed
"""Everything that can happen to a generation. `Succeeded` and `Failed` end it."""
