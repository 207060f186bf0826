"""Options of a request, such as previews, output, priority and LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "DisconnectPolicy",
    "DisconnectPolicyName",
    "FormatName",
    "GenerateOptions",
    "Lora",
    "MethodName",
    "Output",
    "PreviewMethod",
    "Previews",
    "Priority",
    "PriorityName",
    "PromptSyntax",
    "PromptSyntaxName",
    "Sigmas",
    "SigmasName",
    "SpacingName",
    "Speed",
    "SpeedName",
    "TimestepSpacing",
]

DisconnectPolicyName: TypeAlias = Literal["cancel", "keep"]
FormatName: TypeAlias = Literal["jpeg", "png", "webp"]
PriorityName: TypeAlias = Literal["interactive", "batch"]
PromptSyntaxName: TypeAlias = Literal["plain", "weighted"]
SigmasName: TypeAlias = Literal["karras", "exponential", "beta"]
SpacingName: TypeAlias = Literal["leading", "trailing", "linspace"]
SpeedName: TypeAlias = Literal["exact", "fast"]
MethodName: TypeAlias = Literal["auto", "head", "tiny_vae", "full_vae", "none"]


class Priority(StrEnum):
    """Rank in the server's queue. Arguments also accept the plain strings "interactive" and "batch"."""

    INTERACTIVE = "interactive"
    """A person waits for the image."""
    BATCH = "batch"
    """Starts only when no interactive request is queued, and never takes the last of several slots."""


class Speed(StrEnum):
    """Which denoising steps the server computes. Arguments also accept the plain strings "exact" and "fast"."""

    EXACT = "exact"
    """All steps."""
    FAST = "fast"
    """About half of the steps; the model's output at the other ones is forecast. The image is close to the exact one.
    Needs at least 16 steps, and one of `Model.fast_schedulers`."""


class PromptSyntax(StrEnum):
    """How the server reads a prompt. Arguments also accept the plain strings "plain" and "weighted"."""

    PLAIN = "plain"
    """Every character is text."""
    WEIGHTED = "weighted"
    """Parts can have weights: `(red:1.4)` weighs "red" 1.4 times, `(red)` 1.1 times and `[red]` 1 / 1.1 times. A
    backslash before a bracket makes it text. A long prompt is read in parts instead of being truncated."""


class Sigmas(StrEnum):
    """Noise levels of the denoising steps. Arguments also accept plain strings, such as "karras"."""

    KARRAS = "karras"
    """Karras et al. 2022, arXiv 2206.00364, equation 5."""
    EXPONENTIAL = "exponential"
    """Evenly spaced logarithms."""
    BETA = "beta"
    """Quantiles of a beta distribution; arXiv 2407.12173."""


class TimestepSpacing(StrEnum):
    """Spacing of the timesteps; table 2 of arXiv 2305.08891. Arguments also accept plain strings, such as "leading"."""

    LEADING = "leading"
    """Starts slightly below the last timestep of the training."""
    TRAILING = "trailing"
    """Starts at the last timestep of the training."""
    LINSPACE = "linspace"
    """Evenly spaced from the last timestep to the first."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA and its strength.

    Usage::

        client.generate("a red apple", loras=[Lora("pixel-art", 0.8), Lora("sharp")])
        client.generate("a red apple", loras={"pixel-art": 0.8, "sharp": 1})

    Attributes:
        name: One of `Model.loras`.
        scale: Factor of its weights, -10 to 10. 1 is the strength that it was trained with.
    """

    name: str
    scale: float = 1.0


class DisconnectPolicy(StrEnum):
    """What happens when the last reader leaves before the end. Arguments also accept "cancel" and "keep"."""

    CANCEL = "cancel"
    """The server cancels the generation after `disconnect_grace` seconds."""
    KEEP = "keep"
    """The generation runs to its end, and `watch` can follow it for a while after that."""


class PreviewMethod(StrEnum):
    """How previews are made. Arguments also accept plain strings, such as "head"."""

    AUTO = "auto"
    """The best method whose measured cost is within the server's limit, a share of the denoising time."""
    HEAD = "head"
    """A linear map from latents to a small image, fitted to the model. Nearly free."""
    TINY_VAE = "tiny_vae"
    """A small decoder that the server's operator configured."""
    FULL_VAE = "full_vae"
    """The model's own decoder. Exact, but may take longer than a denoising step."""
    NONE = "none"
    """No previews."""
    UNKNOWN = "unknown"
    """A method that this version of the client does not know. Not valid in a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Previews:
    """Size, quality and rate of previews. Omitted options use the server's defaults (see `Model.previews`).

    A preview is sent when at least `every_steps` steps and `min_interval` seconds have passed since the last one. The
    last step always has a preview, unless the method is "none".

    Usage::

        client.generate("a red apple", previews=Previews(every_steps=2, max_edge=256))
        client.generate("a red apple", previews=Previews(method="none"))

    Attributes:
        every_steps: Minimum number of steps between previews, 1 to 1000.
        min_interval: Minimum time between previews in seconds, 0 to 60.
        max_edge: Maximum length of the longer edge in pixels, 16 to `Model.max_preview_edge`. A preview is smaller when
            its method has fewer pixels.
        quality: JPEG quality, 1 to `Model.max_preview_quality`.
        method: How previews are made: one of `Model.preview_methods`, "auto" or "none".
    """

    every_steps: int | None = None
    min_interval: float | None = None
    max_edge: int | None = None
    quality: int | None = None
    method: PreviewMethod | MethodName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Format of the final image. Default: a PNG with metadata.

    Usage::

        client.generate("a red apple", output=Output(format="webp", quality=80))

    Attributes:
        format: "jpeg", "png" or "webp". Default: "png".
        quality: Quality of a JPEG, 1 to 95, or of a lossy WebP, 1 to 100. Default: 90. Invalid for PNG, which is
            lossless.
        metadata: Whether the server writes the generation parameters (prompt, seed, size, ...) into the file; see
            `Image.parameters`. Default: True.
    """

    format: FormatName | None = None
    quality: int | None = None
    metadata: bool | None = None


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `Client.generate_many`, with the meaning that they have in `Client.generate`."""

    negative_prompt: str | None
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    scheduler: str | None
    sigmas: Sigmas | SigmasName | None
    spacing: TimestepSpacing | SpacingName | None
    speed: Speed | SpeedName | None
    loras: Sequence[Lora] | Mapping[str, float] | None
    prompt_syntax: PromptSyntax | PromptSyntaxName | None
    priority: Priority | PriorityName | None
    on_disconnect: DisconnectPolicy | DisconnectPolicyName | None
    disconnect_grace: float | None
    previews: Previews | None
    output: Output | None
