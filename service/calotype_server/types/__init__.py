"""The values that flow through the server: a `Job` goes in, events come out. Standard library only."""

from __future__ import annotations

from calotype_server.types.events import (
    Decoding,
    Denoising,
    EncodingPrompt,
    Event,
    Failed,
    Heartbeat,
    Notice,
    Noticed,
    Phase,
    PreviewReady,
    Queued,
    Succeeded,
    Timings,
    Withdrawn,
)
from calotype_server.types.images import (
    EncodedImage,
    ImageFormat,
    Pixels,
)
from calotype_server.types.jobs import (
    DeliveryOptions,
    DisconnectPolicy,
    Job,
    OutputOptions,
    Priority,
)
from calotype_server.types.loras import Lora
from calotype_server.types.models import (
    MemoryModel,
    ModelInfo,
)
from calotype_server.types.previews import (
    RENDERED_PREVIEW_METHODS,
    PreviewMethod,
    PreviewOptions,
)
from calotype_server.types.prompts import PromptSyntax
from calotype_server.types.schedulers import SchedulerInfo, Sigmas, TimestepSpacing
from calotype_server.types.schedules import Schedule
from calotype_server.types.sizes import OtherSizes
from calotype_server.types.speed import (
    FAST_MIN_STEPS,
    Speed,
    computed_steps,
    forecast_steps,
)

__all__ = [
    "FAST_MIN_STEPS",
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
    "Lora",
    "MemoryModel",
    "ModelInfo",
    "Notice",
    "Noticed",
    "OtherSizes",
    "OutputOptions",
    "Phase",
    "Pixels",
    "PreviewMethod",
    "PreviewOptions",
    "PreviewReady",
    "Priority",
    "PromptSyntax",
    "Queued",
    "Schedule",
    "SchedulerInfo",
    "Sigmas",
    "Speed",
    "Succeeded",
    "TimestepSpacing",
    "Timings",
    "Withdrawn",
    "computed_steps",
    "forecast_steps",
]
