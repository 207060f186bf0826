"""What people hold: progress and the model. No wire types here, see `_convert`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from ._image import Image
    from ._options import PreviewMethod, Previews

__all__ = ["GenerationSummary", "Model", "Notice", "Phase", "Progress", "Timings"]


class Phase(StrEnum):
    """What a generation is doing, or how it ended. It only moves forward."""

    QUEUED = "queued"
    """Waiting for its turn."""
    ENCODING_PROMPT = "encoding_prompt"
    """Turning the prompt into embeddings."""
    DENOISING = "denoising"
    """Denoising the latents, step by step."""
    DECODING = "decoding"
    """Decoding the latents to the final image."""
    SUCCEEDED = "succeeded"
    """Ended with the final image."""
    FAILED = "failed"
    """Ended without an image."""
    CANCELLED = "cancelled"
    """Ended because the caller cancelled it or left."""
    UNKNOWN = "unknown"
    """A phase that a newer server knows and this client does not. Not an end."""

    @property
    def ended(self) -> bool:
        """Whether the generation is over."""
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


@dataclass(frozen=True, slots=True)
class Notice:
    """Something worth knowing that did not stop the generation.

    Attributes:
        reason: Machine-readable, in UPPER_SNAKE_CASE, such as PROMPT_TRUNCATED.
        message: One sentence for people.
    """

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a generation went, in seconds. A phase that was not reached is None.

    Attributes:
        queued: From acceptance to the start of work.
        encoding_prompt: From the start of work to the first denoising step.
        denoising: From the first denoising step to the last.
        decoding: From the last denoising step to the final image file.
        first_preview: From acceptance to the first preview.
        total: From acceptance to the end.
    """

    queued: float | None = None
    encoding_prompt: float | None = None
    denoising: float | None = None
    decoding: float | None = None
    first_preview: float | None = None
    total: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a generation stands and, where there is a new one, a picture.

    Attributes:
        generation_id: For `Client.watch`, `cancel` and `finish`. The same for a whole generation, unless the server
            lost it and the client has begun another in its place.
        sequence: Rises strictly from 1. A gap means that messages were merged because the reader was slow. When the
            client has begun another generation in the place of a lost one, it counts on.
        phase: What is being done, or how it ended.
        step: Denoising steps done, 0 to `total_steps`. Never falls.
        total_steps: Denoising steps in all. 0 until it is known.
        preview: The model's current estimate of the finished picture, or None when there is no new one.
        preview_method: What drew the preview. None when there is none, or the server does not say.
        image_step: Step whose estimate the picture shows. 0 when there is none.
        queue_position: Place in the queue: 1 is the next to start. 0 when not queued.
        estimated_remaining: Seconds until the final image, waiting included. None when nothing was measured yet.
        previews_dropped: Previews that were not sent, because the reader or the encoder was slow.
        previews_withdrawn: Whether the model's safety checker objects to this picture: take every preview of this
            generation from the screen. Once True it stays True, and the generation then fails with the reason
            CONTENT_WITHHELD. A loop is told before it raises.
        seed: Seed in use: the one asked for, or the one drawn.
        warnings: What the caller should know although the generation goes on, such as a prompt that was cut.
        timings: Where the time went, at the end. None before.
        finished_early: At the end: whether the image is the estimate of `step`, because `finish` asked for it.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSummary:
    """Where one generation stands.

    Attributes:
        generation_id: For `Client.watch`, `cancel` and `finish`.
        request_id: As asked for; empty when there was none.
        prompt: What it shows.
        phase: What is being done, or how it ended.
        step: Denoising steps done.
        total_steps: Denoising steps in all. 0 until it is known.
        seed: Seed in use.
        create_time: When the server accepted it, in UTC.
    """

    generation_id: str
    request_id: str
    prompt: str
    phase: Phase
    step: int
    total_steps: int
    seed: int
    create_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The loaded model: what it can do and what it does by default.

    Attributes:
        name: `bundled`, a hub id or the name of a folder.
        pipeline: Class of the diffusers pipeline, such as StableDiffusionPipeline.
        width: Default width in pixels: the model's native one.
        height: Default height in pixels: the model's native one.
        size_multiple: Widths and heights are multiples of this, in pixels.
        max_pixels: Largest width times height accepted.
        steps: Default number of denoising steps.
        max_steps: Largest number of denoising steps accepted.
        guidance_scale: Default guidance scale. None when the model takes none.
        takes_negative_prompt: Whether a negative prompt is accepted.
        scheduler: Default scheduler.
        schedulers: Schedulers accepted, sorted; the names of diffusers' classes.
        max_prompt_chars: Longest prompt accepted, in characters.
        max_prompt_tokens: Longest prompt that the model reads, in tokens, special tokens included. 0 when unknown.
        preview_methods: Methods that `Previews.method` may name, besides "auto" and "none".
        previews: Default previews, every option set.
        max_preview_edge: Largest `Previews.max_edge` accepted, in pixels.
        max_preview_quality: Largest `Previews.quality` accepted.
        max_active: Generations worked on at the same time; more wait in the queue.
        max_batch_rows: Rows of latents of concurrent generations that the denoiser computes together at most. 0 when
            their calls are not joined.
        unbatched_reason: Why they are not, in one sentence. Empty when they are.
        replica: Tells the server that answered from others of the same model. Ids of its generations begin with it.
        device: Where the model runs, such as cpu or cuda:0.
        dtype: Number format of its weights, such as float32 or bfloat16.
        server_version: Version of the server.
    """

    name: str
    pipeline: str
    width: int
    height: int
    size_multiple: int
    max_pixels: int
    steps: int
    max_steps: int
    guidance_scale: float | None
    takes_negative_prompt: bool
    scheduler: str
    schedulers: tuple[str, ...] = field(repr=False)
    max_prompt_chars: int
    max_prompt_tokens: int
    preview_methods: tuple[PreviewMethod, ...]
    previews: Previews
    max_preview_edge: int
    max_preview_quality: int
    max_active: int
    max_batch_rows: int
    unbatched_reason: str
    replica: str = ""
    device: str
    dtype: str
    server_version: str
