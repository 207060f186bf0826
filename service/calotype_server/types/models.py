"""The loaded model: what it can do, and how much memory it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calotype_server.types.prompts import PromptSyntax
from calotype_server.types.schedulers import SchedulerInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from calotype_server.types.previews import PreviewMethod

__all__ = [
    "MemoryModel",
    "ModelInfo",
]


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Memory that generations may use, and how much one of them needs, measured when the model is loaded.

    Generations denoise at the same time, but one after the other decodes its image.

    Attributes:
        available: Bytes for all running generations together, in addition to the loaded model.
        denoising: Bytes per pixel and per squared pixel of a generation that denoises.
        decoding: The same in addition while it decodes.
    """

    available: int
    denoising: tuple[float, float]
    decoding: tuple[float, float]

    def need(self, sizes: Iterable[int]) -> float:
        """Returns the bytes that generations of these sizes, in pixels, need at most if they run at the same time."""
        sizes = list(sizes)
        (linear, square), (last, last_square) = self.denoising, self.decoding
        running = sum(linear * size + square * size**2 for size in sizes)
        return running + max((last * size + last_square * size**2 for size in sizes), default=0.0)

    @property
    def max_pixels(self) -> int:
        """The largest image, in pixels, that fits if nothing else runs."""
        linear, square = (sum(parts) for parts in zip(self.denoising, self.decoding, strict=True))
        # The solution of `linear * x + square * x**2 = available` in a form that is also stable for small `square`.
        return math.floor(2 * self.available / (linear + math.sqrt(linear**2 + 4 * square * self.available)))


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
        guidance_scale: Default guidance, or None when no guidance scale has an effect.
        takes_negative_prompt: Whether a negative prompt can have an effect.
        scheduler: Class name of the default scheduler.
        schedulers: Class names that requests may choose, sorted; they include the default.
        negative_prompt_above: A negative prompt has an effect only with a guidance scale above this one; None if it
            always has one.
        max_step_counts: Maximum number of steps, for each scheduler that has one.
        fast_schedulers: Schedulers and aliases that `Speed.FAST` works with, sorted; empty when it is not offered.
        max_prompt_tokens: Tokens that the text encoder reads, including special ones; 0 when unknown.
        device: Torch device, such as "cpu" or "cuda:0".
        dtype: Number format of the weights, such as "float32".
        preview_methods: Methods that can render previews of this model.
        max_active: Generations that run at the same time.
        max_progressing: Running generations that progress at the same time, those that started first; all others wait,
            mostly. 0 if all progress.
        max_batch_rows: Maximum rows of latents in one call of the denoiser; 0 when it does not batch requests.
        unbatched_reason: One sentence why the denoiser does not batch requests; empty when it does.
        accelerator: How the denoiser is computed: "none" for plain calls, or "graphs", "compile" or "openvino".
        accelerator_fallback: One sentence why it is not the accelerator that the operator chose; empty if it is.
        memory: Memory that generations need; None when it is not known or does not matter.
        loras: Names of the LoRAs that requests can apply, sorted.
        sizes: Width and height, in pixels, of sizes that the model draws well; the default size first.
        min_pixels: Minimum width times height of other sizes; 0 if only `sizes` are supported.
        max_pixels: Maximum width times height of other sizes, or None if the model has no limit.
        max_aspect_ratio: Maximum longer edge, divided by the shorter one, of other sizes; infinite if there is none.
        scales_other_sizes: Whether unsupported sizes are drawn at the nearest supported size and scaled.
        prompt_syntaxes: Syntaxes of prompts that the model supports.
        scheduler_details: Aliases and options of each of `schedulers`, in the same order.
        quantization: Number format to which the weights were quantized, such as "int8"; empty if they were not.
        offload: How weights move between the device and the host: "model", "group", or empty if they do not.
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
    negative_prompt_above: float | None = None
    max_step_counts: Mapping[str, int] = field(default_factory=dict)
    fast_schedulers: tuple[str, ...] = ()
    preview_methods: tuple[PreviewMethod, ...] = ()
    max_active: int = 1
    max_progressing: int = 0
    max_batch_rows: int = 0
    unbatched_reason: str = ""
    accelerator: str = "none"
    accelerator_fallback: str = ""
    memory: MemoryModel | None = None
    loras: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    min_pixels: int = 1
    max_pixels: int | None = None
    max_aspect_ratio: float = math.inf
    scales_other_sizes: bool = False
    prompt_syntaxes: tuple[PromptSyntax, ...] = (PromptSyntax.PLAIN,)
    scheduler_details: tuple[SchedulerInfo, ...] = ()
    quantization: str = ""
    offload: str = ""

    def scheduler_info(self, scheduler: str) -> SchedulerInfo | None:
        """Returns the details of a scheduler, given its class name or one of its aliases; None if it is unknown."""
        for info in self.scheduler_details:
            if scheduler == info.name or scheduler in info.aliases:
                return info
        return SchedulerInfo(scheduler) if scheduler in self.schedulers else None

    def max_steps(self, scheduler: str, ceiling: int) -> int:
        """Returns the maximum number of steps with this scheduler or alias, at most `ceiling`."""
        info = self.scheduler_info(scheduler)
        return ceiling if info is None else min(ceiling, self.max_step_counts.get(info.name, ceiling))

    def supports_size(self, width: int, height: int) -> bool:
        """Returns whether the model draws this size well, in pixels. Limits of the operator are not considered."""
        if (width, height) == (self.width, self.height) or (width, height) in self.sizes:
            return True
        shorter, longer = sorted((width, height))
        return (
            self.min_pixels > 0
            and shorter > 0
            and width % self.size_multiple == height % self.size_multiple == 0
            and self.min_pixels <= width * height
            and (self.max_pixels is None or width * height <= self.max_pixels)
            and longer <= self.max_aspect_ratio * shorter
        )
