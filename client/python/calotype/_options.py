"""What people ask for: how previews look, and how the final image is written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

__all__ = [
    "DisconnectPolicy",
    "DisconnectPolicyName",
    "FormatName",
    "MethodName",
    "Output",
    "PreviewMethod",
    "Previews",
    "Priority",
    "PriorityName",
]

DisconnectPolicyName: TypeAlias = Literal["cancel", "keep"]
FormatName: TypeAlias = Literal["jpeg", "png", "webp"]
PriorityName: TypeAlias = Literal["interactive", "batch"]
MethodName: TypeAlias = Literal["auto", "head", "tiny_vae", "full_vae", "none"]


class Priority(StrEnum):
    """Rank in the queue of the server. A plain string, such as "batch", does as well."""

    INTERACTIVE = "interactive"
    """Somebody is waiting for it."""
    BATCH = "batch"
    """Nobody is: it starts when nothing interactive waits, and never takes the last of several slots."""


class DisconnectPolicy(StrEnum):
    """What happens to a generation when its last reader leaves before the end. A plain string does as well."""

    CANCEL = "cancel"
    """It is cancelled, after a grace."""
    KEEP = "keep"
    """It goes on to its end, and can be watched for a while after that."""


class PreviewMethod(StrEnum):
    """What draws previews. A plain string, such as "head", does as well."""

    AUTO = "auto"
    """The best that costs the denoiser no more than a set share of its time, chosen from what was measured."""
    HEAD = "head"
    """A linear map from latents to a small picture, fitted to the model. Costs next to nothing."""
    TINY_VAE = "tiny_vae"
    """A small decoder that the operator of the server has configured."""
    FULL_VAE = "full_vae"
    """The model's own decoder: exact, and may cost more than a step."""
    NONE = "none"
    """No previews."""
    UNKNOWN = "unknown"
    """A method that a newer server knows and this client does not. Cannot be asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Previews:
    """How previews look and how often they come. What is left out is as in `Model.previews`.

    All options hold together: a preview comes when enough steps and enough time have passed. The last step is always
    shown, unless the method is "none".

    Usage::

        client.generate("a red apple", previews=Previews(every_steps=2, max_edge=256))
        client.generate("a red apple", previews=Previews(method="none"))

    Attributes:
        every_steps: Shows every nth step at most, 1 to 1000.
        min_interval: Least time between two previews in seconds, 0 to 60.
        max_edge: Longer edge at most in pixels, 16 to `Model.max_preview_edge`. Previews are never larger than what is
            known of the picture, so they may be smaller.
        quality: JPEG quality, 1 to `Model.max_preview_quality`.
        method: What draws them: one of `Model.preview_methods`, "auto" or "none".
    """

    every_steps: int | None = None
    min_interval: float | None = None
    max_edge: int | None = None
    quality: int | None = None
    method: PreviewMethod | MethodName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How the final image is written. What is left out, the server chooses: a PNG with metadata.

    Usage::

        client.generate("a red apple", output=Output(format="webp", quality=80))

    Attributes:
        format: "jpeg", "png" or "webp".
        quality: Quality of JPEG, 1 to 95, or of lossy WebP, 1 to 100. Default: 90. Refused for PNG, which loses none.
        metadata: Whether the parameters (prompt, seed, size, ...) are written into the file, see `Image.parameters`.
            Default: True.
    """

    format: FormatName | None = None
    quality: int | None = None
    metadata: bool | None = None
