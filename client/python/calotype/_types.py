"""Data that the client returns: progress, summaries and the model. `_convert` makes it from messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datetime import datetime

    from ._image import Image
    from ._options import PreviewMethod, Previews, PromptSyntax, Sigmas, TimestepSpacing

__all__ = [
    "GenerationSummary",
    "MemberProgress",
    "Model",
    "Notice",
    "Phase",
    "Progress",
    "Scheduler",
    "Size",
    "Timings",
]


class Phase(StrEnum):
    """The phase of a generation, or how it ended. Phases only move forward."""

    QUEUED = "queued"
    """Waiting in the queue."""
    ENCODING_PROMPT = "encoding_prompt"
    """Computing the embeddings of the prompt."""
    DENOISING = "denoising"
    """Denoising the latents, step by step."""
    DECODING = "decoding"
    """Decoding the latents to the final image."""
    SUCCEEDED = "succeeded"
    """Ended with the final image."""
    FAILED = "failed"
    """Ended without an image because of an error."""
    CANCELLED = "cancelled"
    """Ended without an image because it was cancelled, or its caller left."""
    UNKNOWN = "unknown"
    """A phase that this version of the client does not know. Not an end."""

    @property
    def ended(self) -> bool:
        """Whether this phase is an end: SUCCEEDED, FAILED or CANCELLED."""
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning: a problem that did not stop the generation.

    Attributes:
        reason: Reason for programs, in UPPER_SNAKE_CASE, such as PROMPT_TRUNCATED.
        message: One sentence for people.
    """

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of a generation in seconds. None for a phase that was not reached.

    Attributes:
        queued: From acceptance to the start of work.
        encoding_prompt: From the start of work to the first denoising step.
        denoising: From the first denoising step to the last.
        decoding: From the last denoising step to the final image file.
        first_preview: From acceptance to the first preview.
        total: From acceptance to the end.
        computed_steps: Number of denoising steps that the server computed: `Progress.step`, or fewer with the speed
            "fast". 0 until denoising is complete.
    """

    queued: float | None = None
    encoding_prompt: float | None = None
    denoising: float | None = None
    decoding: float | None = None
    first_preview: float | None = None
    total: float | None = None
    computed_steps: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a generation, with a preview if there is a new one.

    Attributes:
        generation_id: Id for `Client.watch`, `cancel` and `finish`. It changes only when the server lost the generation
            and the client requested it again.
        sequence: Number of the message. Increases strictly from 1, also across reconnections. A gap means that the
            server merged messages because the reader was slow.
        phase: Stage of the generation, or how it ended.
        step: Number of completed denoising steps, 0 to `total_steps`. Never decreases.
        total_steps: Total number of denoising steps. 0 until it is known.
        preview: The model's current estimate of the finished image. None when there is no new preview.
        preview_method: How the preview was made. None without a preview.
        image_step: The step of the preview or final image. 0 without one.
        queue_position: Position in the queue; 1 starts next. 0 when not queued.
        estimated_remaining: Seconds until the final image, including time in the queue. None without an estimate.
        previews_dropped: Number of previews that were not sent because the reader or the encoder was slow.
        previews_withdrawn: Whether the model's safety checker rejected the image. Remove all previews of this
            generation from the screen. Stays True; the generation then fails with the reason CONTENT_WITHHELD. The loop
            yields this before it raises.
        seed: Seed in use: the requested seed, or the one that the server drew.
        warnings: Problems that do not stop the generation, such as a truncated prompt.
        timings: Durations, at the end. None before.
        finished_early: At the end: whether `finish` ended the generation early, so that the image shows `step`.
        not_persisted: At the end: whether a server that stores generations on disk could not store this one. After a
            crash of the server, it may run again.
    """

    generation_id: str
    sequence: int
    phase: Phase
    step: int = 0
    total_steps: int = 0
    preview: Image | None = None
    preview_method: PreviewMethod | None = None
    image_step: int = 0
    queue_position: int = 0
    estimated_remaining: float | None = None
    previews_dropped: int = 0
    previews_withdrawn: bool = False
    seed: int = 0
    warnings: tuple[Notice, ...] = ()
    timings: Timings | None = None
    finished_early: bool = False
    not_persisted: bool = False


class MemberProgress(NamedTuple):
    """The progress of one member of a group.

    Attributes:
        member: Index of the member in `GenerationGroup.generations`, from 0.
        progress: Its progress.
    """

    member: int
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSummary:
    """One entry of `Client.generations`.

    Attributes:
        generation_id: Id for `Client.watch`, `cancel` and `finish`.
        request_id: Id of the request. Empty if it had none.
        prompt: Prompt of the request.
        phase: Stage of the generation, or how it ended.
        step: Number of completed denoising steps.
        total_steps: Total number of denoising steps. 0 until it is known.
        seed: Seed in use.
        create_time: When the server accepted the request, in UTC.
        group: Group of the request. Empty if it had none.
    """

    generation_id: str
    request_id: str
    prompt: str
    phase: Phase
    step: int
    total_steps: int
    seed: int
    create_time: datetime
    group: str = ""


class Size(NamedTuple):
    """Width and height of an image, in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """A scheduler (sampler) that a model supports.

    Attributes:
        name: Name of a class of diffusers, as in `Model.schedulers`.
        aliases: Familiar names of this scheduler with fixed options, such as "DPM++ 2M Karras". `Client.generate`
            accepts them as `scheduler`, regardless of case.
        sigmas: Valid values of `sigmas` with this scheduler.
        spacings: Valid values of `spacing` with this scheduler.
    """

    name: str
    aliases: tuple[str, ...] = ()
    sigmas: tuple[Sigmas, ...] = ()
    spacings: tuple[TimestepSpacing, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model that a server has loaded, with its limits and defaults.

    Attributes:
        name: "bundled", a Hugging Face Hub id, or the name of a folder.
        pipeline: Class of the diffusers pipeline, such as StableDiffusionPipeline.
        width: Default width in pixels, the model's native width.
        height: Default height in pixels, the model's native height.
        size_multiple: Width and height must be multiples of this number of pixels.
        max_pixels: Maximum of width times height.
        sizes: Sizes that the model draws well, the default size first. If `min_pixels` is 0, these are all supported
            sizes.
        min_pixels: Minimum of width times height for sizes that are not in `sizes`. 0 if only `sizes` are supported.
        max_aspect_ratio: Maximum of the longer edge divided by the shorter one, for sizes that are not in `sizes`. None
            if there is no limit.
        scales_other_sizes: Whether the server also accepts unsupported sizes: it draws the nearest supported size,
            scales the image, and warns with the reason SIZE_SCALED.
        steps: Default number of denoising steps.
        max_steps: Maximum number of denoising steps.
        guidance_scale: Default guidance scale. None if the model has no guidance.
        takes_negative_prompt: Whether requests may have a negative prompt.
        scheduler: Default scheduler.
        schedulers: Valid schedulers, sorted: names of classes of diffusers.
        scheduler_details: Aliases and options of each scheduler, in the order of `schedulers`.
        fast_schedulers: Schedulers and aliases that support the speed "fast", sorted. Empty if the server does not
            offer it.
        loras: Names of the LoRAs that requests can apply, sorted.
        prompt_syntaxes: Valid values of `prompt_syntax`.
        max_prompt_chars: Maximum length of a prompt in characters.
        max_prompt_tokens: Number of tokens that the model reads of a prompt, including special tokens; the rest is
            truncated. 0 if unknown.
        preview_methods: Valid methods of `Previews.method`, in addition to "auto" and "none".
        previews: Default previews. Every option is set.
        max_preview_edge: Maximum of `Previews.max_edge`, in pixels.
        max_preview_quality: Maximum of `Previews.quality`.
        max_active: Maximum number of generations that run at the same time. Others wait in the queue.
        max_batch_rows: Maximum number of latents, of all running generations, in one batch of the denoiser. 0 if the
            server does not batch.
        unbatched_reason: Why the server does not batch, in one sentence. Empty if it does.
        accelerator: How the denoiser is computed: "none" for plain calls, or "graphs", "compile" or "openvino".
        accelerator_fallback: Why it is not the accelerator that the operator chose, in one sentence. Empty if it is.
        replica: Tag of the server, to distinguish servers of the same model. Ids of its generations begin with it.
        device: Device of the model, such as "cpu" or "cuda:0".
        dtype: Number format of the weights, such as "float32" or "bfloat16".
        quantization: Number format to which the weights are quantized, such as "int8". Empty if they are not.
        offload: How weights move between the device and the host: "model" or "group". Empty if they stay on the device.
        server_version: Version of the server.
    """

    name: str
    pipeline: str
    width: int
    height: int
    size_multiple: int
    max_pixels: int
    sizes: tuple[Size, ...] = field(default=(), repr=False)
    min_pixels: int = 1
    max_aspect_ratio: float | None = None
    scales_other_sizes: bool = False
    steps: int
    max_steps: int
    guidance_scale: float | None
    takes_negative_prompt: bool
    scheduler: str
    schedulers: tuple[str, ...] = field(repr=False)
    scheduler_details: tuple[Scheduler, ...] = field(default=(), repr=False)
    fast_schedulers: tuple[str, ...] = field(default=(), repr=False)
    loras: tuple[str, ...] = ()
    prompt_syntaxes: tuple[PromptSyntax, ...] = ()
    max_prompt_chars: int
    max_prompt_tokens: int
    preview_methods: tuple[PreviewMethod, ...]
    previews: Previews
    max_preview_edge: int
    max_preview_quality: int
    max_active: int
    max_batch_rows: int
    unbatched_reason: str
    accelerator: str = "none"
    accelerator_fallback: str = ""
    replica: str = ""
    device: str
    dtype: str
    quantization: str = ""
    offload: str = ""
    server_version: str
