"""Settings of a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from calotype_server.limits import (
    DEFAULT_LIMITS,
    JPEG_QUALITY_MAX,
    PREVIEW_EDGE_MIN,
    PREVIEW_EVERY_STEPS_MAX,
    PREVIEW_INTERVAL_MAX,
    Limits,
)
from calotype_server.settings.parsing import check_address, named_values, split_list, split_repeated
from calotype_server.settings.web import WebSettings
from calotype_server.types import RENDERED_PREVIEW_METHODS, OtherSizes, PreviewMethod, PreviewOptions, Schedule

__all__ = ["Settings"]

_PREVIEW = DEFAULT_LIMITS.preview

_TEXT_ENCODER = re.compile(r"(?:(?P<name>text_encoder\w*)=)?(?P<source>.+)")


class Settings(WebSettings):
    """Settings of `calotype serve`."""

    lists: ClassVar[frozenset[str]] = WebSettings.lists | {"preview_methods", "embedding", "lora", "text_encoder"}
    repeated: ClassVar[frozenset[str]] = WebSettings.repeated | {"embedding", "lora", "text_encoder"}

    grpc_address: str = Field(
        "127.0.0.1:50051", description="HOST:PORT of the native gRPC port. Port 0 picks a free one."
    )
    model: str = Field(
        "bundled",
        description="Model to serve: 'bundled', a hub id such as org/name, a local diffusers folder, or a single "
        ".safetensors or .gguf file.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id. Default: its main branch.")
    variant: str | None = Field(None, description="Variant of the weights to load, such as fp16.")
    embedding: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="NAME=PATH_OR_HUB_ID[:FILE] of a textual inversion for Stable Diffusion 1.x, 2.x or XL, as "
        "safetensors, that prompts use by its name. Repeat the option for more, as for --lora. Default: none.",
    )
    config: str | None = Field(
        None,
        description="For a single file: folder or hub id of a pipeline whose configs, tokenizers and other components "
        "fit it. Default: the model on the hub that this kind of file is based on.",
    )
    vae: str | None = Field(None, description="Folder, hub id or .safetensors file of a VAE. Default: the model's own.")
    text_encoder: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Folder, hub id or .safetensors file of a text encoder. For another than the first, put the "
        "component's name before it, such as text_encoder_2=PATH. Repeat the option for more, as for --lora. Default: "
        "the model's own.",
    )
    safety_checker: bool = Field(
        True,
        description="Load the safety checker of a model that has one. Without it, neither images nor previews are "
        "checked.",
    )
    lora: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="NAME=PATH_OR_HUB_ID[:FILE] of a LoRA that requests may choose: a .safetensors file, or "
        "a folder or hub id that has one. Repeat the option for more; the variable takes a comma-separated list or a "
        "JSON list. Default: none.",
    )
    device: str | None = Field(
        None,
        description="Torch device, such as cpu, cuda:1, xpu or mps. Default: the first of cuda, xpu and mps that is "
        "available, or else cpu.",
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None,
        description="Number format of the weights: float32, float16 or bfloat16. Default: bfloat16 or float16 on cuda "
        "and xpu, float32 on mps and cpu.",
    )
    quantize: Literal["int8", "fp8", "nf4"] | None = Field(
        None,
        description="Format for the linear layers of the denoiser and of large text encoders: int8, fp8 or nf4. It "
        "saves memory, and changes images slightly. Needs 'calotype[quantize]'. Default: that of the model's files.",
    )
    offload: Literal["model", "group"] | None = Field(
        None,
        description="Keep weights in ordinary memory until a GPU needs them: model (one model at a time, and one "
        "generation at a time) or group (a few layers at a time). Slower; not tried on a GPU yet. Default: they stay "
        "on the device.",
    )
    accelerate: Literal["auto", "none", "graphs", "compile", "openvino"] = Field(
        "auto",
        description="How to compute the denoiser: none (plain calls), graphs (CUDA graphs), compile (torch.compile), "
        "openvino (on CPUs, needs 'calotype[openvino]'), or auto, which is none. If an accelerator fails or does not "
        "give the model's answers, plain calls are used.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads that torch uses. Default: measured at startup.")
    step_count: int | None = Field(
        None, ge=1, description="Denoising steps of requests that set none. Default: the model's."
    )
    guidance_scale: float | None = Field(
        None, ge=0, description="Guidance scale of requests that set none. Default: the model's."
    )
    max_step_count: int = Field(DEFAULT_LIMITS.max_step_count, ge=1, description="Maximum denoising steps per request.")
    max_pixels: int = Field(DEFAULT_LIMITS.max_pixels, ge=64, description="Maximum width times height, in pixels.")
    other_sizes: OtherSizes = Field(
        OtherSizes.REJECT,
        description="What to do with requests for sizes that the model does not draw well: reject; scale (draw the "
        "nearest supported size and scale the image); or draw (anyway).",
    )
    max_prompt_chars: int = Field(
        DEFAULT_LIMITS.max_prompt_chars, ge=1, description="Maximum length of a prompt, in characters."
    )
    max_active: int | None = Field(
        None,
        ge=1,
        description="Maximum generations that run at the same time. Default: as many as memory allows, up to 8.",
    )
    schedule: Schedule = Field(
        Schedule.FIRST_LOOK,
        description="Order of running generations if one call of the denoiser cannot compute a step of each. "
        "first-look: those without a finished step, then the oldest; fair: in turn; fifo: the oldest.",
    )
    max_batch_rows: int | None = Field(
        None,
        ge=1,
        description="Maximum rows of latents per call of the denoiser. Default: as many as batching makes faster, "
        "measured at startup; with --deterministic, the rows of four requests.",
    )
    deterministic: bool = Field(
        False,
        description="Make every image bit for bit the same, regardless of the other requests in its batch. This makes "
        "the server slower.",
    )
    host_timesteps: bool = Field(
        False,
        description="Let schedulers such as DDIM, DDPM, PNDM and LCM step without waiting for a GPU. Images stay the "
        "same. Off by default, because it has not been tried on a GPU yet.",
    )
    step_cache: bool = Field(
        False,
        description="Let requests choose SPEED_FAST, which computes about half of the denoising steps and forecasts "
        "the other ones. The image is close to the exact one, but not equal.",
    )
    measure_again: bool = Field(
        False, description="Ignore the cached batching plan of the model at this start, and measure a new one."
    )
    max_queue: int = Field(
        32, ge=0, description="Maximum generations in the queue. When it is full, further requests are rejected."
    )
    max_queue_per_caller: int | None = Field(
        None, ge=0, description="Maximum generations of one caller in the queue. Default: half of --max-queue."
    )
    memory_limit: int | None = Field(
        None,
        ge=0,
        description="Memory that running generations may use together, in addition to the loaded model, in bytes. "
        "Default: measured at startup. 0 turns the limit off.",
    )
    preview_method: PreviewMethod = Field(
        _PREVIEW.method,
        description="Preview method of requests that set none: auto, head, tiny_vae, full_vae or none.",
    )
    preview_methods: str = Field(
        ",".join(RENDERED_PREVIEW_METHODS), description="Comma-separated preview methods that requests may choose."
    )
    preview_every_steps: int = Field(
        _PREVIEW.every_steps,
        ge=1,
        le=PREVIEW_EVERY_STEPS_MAX,
        description="Steps between previews, for requests that do not set it.",
    )
    preview_min_interval: float = Field(
        _PREVIEW.min_interval,
        ge=0,
        le=PREVIEW_INTERVAL_MAX,
        description="Minimum seconds between previews, for requests that do not set it.",
    )
    preview_edge: int = Field(
        _PREVIEW.max_edge,
        ge=PREVIEW_EDGE_MIN,
        description="Longer edge of previews in pixels, for requests that do not set it.",
    )
    preview_quality: int = Field(
        _PREVIEW.quality,
        ge=1,
        le=JPEG_QUALITY_MAX,
        description="JPEG quality of previews, for requests that do not set it.",
    )
    preview_budget: float = Field(
        0.02, gt=0, le=1, description="Share of the denoiser's time that previews with the method auto may cost."
    )
    max_preview_edge: int = Field(
        DEFAULT_LIMITS.max_preview_edge,
        ge=PREVIEW_EDGE_MIN,
        description="Maximum length of a preview's longer edge, in pixels.",
    )
    max_preview_quality: int = Field(
        DEFAULT_LIMITS.max_preview_quality, ge=1, le=JPEG_QUALITY_MAX, description="Maximum JPEG quality of a preview."
    )
    tiny_vae: str | None = Field(
        None,
        description="Hub id or folder of an AutoencoderTiny for the model, which renders tiny_vae previews. Default: "
        "that of the bundled model; none for other models.",
    )
    state: Path | None = Field(
        None,
        description="Folder in which generations are stored, so that they survive a restart. Default: they are kept "
        "in memory only.",
    )
    state_timeout_seconds: float = Field(
        10.0,
        gt=0,
        description="Time after which an access to the --state folder fails if the disk does not respond, in seconds.",
    )
    encode_timeout_seconds: float = Field(
        30.0, gt=0, description="Time after which encoding an image as a file fails, in seconds."
    )
    heartbeat_seconds: float = Field(
        5.0, gt=0, le=5, description="Time without events after which readers get a heartbeat, in seconds."
    )
    retain_seconds: float = Field(
        600.0, ge=0, description="Time for which ended generations can still be watched, in seconds."
    )
    retain_count: int = Field(256, ge=0, description="Maximum number of ended generations to keep.")
    retain_bytes: int = Field(
        256 * 2**20,
        ge=0,
        description="Maximum size of the images to keep, including previews of running generations, in bytes.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="Time for running generations to finish after SIGTERM, in seconds."
    )
    watchdog_seconds: float = Field(
        120.0,
        ge=0,
        description="Time without progress of a running generation after which the process exits with code 70, in "
        "seconds. If 20 of its usual steps take longer, that time counts instead. The first generation of each size "
        "gets ten times as long. 0 turns the watchdog off.",
    )
    tracing: bool | None = Field(
        None,
        description="Send OpenTelemetry spans, configured by the standard OTEL_... variables. Default: only if these "
        "variables name a destination.",
    )
    cache_dir: Path = Field(
        Path("~/.cache/calotype"),
        description="Folder for measurements of models, such as the preview head, that later starts reuse.",
    )
    log_prompts: bool = Field(False, description="Log prompts. By default, prompts never appear in the log.")

    @field_validator("grpc_address")
    @classmethod
    def _check_grpc_address(cls, value: str) -> str:
        return check_address(value)

    @field_validator("embedding", "lora", "text_encoder", mode="before")
    @classmethod
    def _split_repeated(cls, value: object) -> object:
        return split_repeated(value)

    @field_validator("embedding", "lora")
    @classmethod
    def _check_named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        named_values(value)
        return value

    @field_validator("preview_methods")
    @classmethod
    def _check_methods(cls, value: str) -> str:
        if not set(split_list(value)) <= set(RENDERED_PREVIEW_METHODS):
            raise ValueError(f"{value!r} is not a list of {', '.join(sorted(RENDERED_PREVIEW_METHODS))}")
        return value

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload is not None and self.accelerate not in ("auto", "none"):
            raise ValueError(f"offload cannot be combined with accelerate {self.accelerate}")
        return self

    @model_validator(mode="after")
    def _check_preview_defaults(self) -> Self:
        for default, maximum in (("preview_edge", "max_preview_edge"), ("preview_quality", "max_preview_quality")):
            # A default that the operator did not set is lowered to the maximum that they set.
            if getattr(self, default) > getattr(self, maximum):
                if default in self.model_fields_set:
                    raise ValueError(f"{default} is above {maximum}")
                setattr(self, default, getattr(self, maximum))
        method = self.preview_method
        if method not in (PreviewMethod.AUTO, PreviewMethod.NONE) and method not in self.allowed_methods:
            raise ValueError(f"preview_method {method} is not among preview_methods")
        return self

    @property
    def text_encoders(self) -> dict[str, str]:
        """The parsed `text_encoder`: the folder, hub id or file of each component."""
        matches = (_TEXT_ENCODER.fullmatch(each) for each in self.text_encoder)
        return {match["name"] or "text_encoder": match["source"] for match in matches if match is not None}

    @property
    def allowed_methods(self) -> frozenset[PreviewMethod]:
        """The parsed `preview_methods`."""
        return frozenset(PreviewMethod(name) for name in split_list(self.preview_methods))

    @property
    def embedding_sources(self) -> dict[str, str]:
        """The parsed `embedding`: `PATH_OR_HUB_ID[:FILE]` by name."""
        return named_values(self.embedding)

    @property
    def lora_sources(self) -> dict[str, str]:
        """The parsed `lora`: `PATH_OR_HUB_ID[:FILE]` by name."""
        return named_values(self.lora)

    @property
    def limits(self) -> Limits:
        """Limits and preview defaults of requests."""
        return Limits(
            max_pixels=self.max_pixels,
            max_output_pixels=self.max_pixels,
            max_step_count=self.max_step_count,
            max_prompt_chars=self.max_prompt_chars,
            max_preview_edge=self.max_preview_edge,
            max_preview_quality=self.max_preview_quality,
            preview=PreviewOptions(
                every_steps=self.preview_every_steps,
                min_interval=self.preview_min_interval,
                max_edge=self.preview_edge,
                quality=self.preview_quality,
                method=self.preview_method,
            ),
            preview_methods=self.allowed_methods,
        )
