"""Limits of requests and ports, and the defaults of those that operators can change. All limits are inclusive."""

from __future__ import annotations

from dataclasses import dataclass, field

from calotype_server.types import RENDERED_PREVIEW_METHODS, PreviewMethod, PreviewOptions

__all__ = [
    "DEFAULT_LIMITS",
    "GRACE_SECONDS_MAX",
    "GROUP_CHARS_MAX",
    "GUIDANCE_SCALE_MAX",
    "JPEG_QUALITY_MAX",
    "LORAS_MAX",
    "LORA_SCALE_MAX",
    "PAGE_SIZE_DEFAULT",
    "PAGE_SIZE_MAX",
    "PORT_LIMITS",
    "PREVIEW_EDGE_MIN",
    "PREVIEW_EVERY_STEPS_MAX",
    "PREVIEW_INTERVAL_MAX",
    "RANDOM_SEED",
    "REQUEST_ID_CHARS_MAX",
    "SEED_MAX",
    "SIDE_PORT_LIMITS",
    "WEBP_QUALITY_MAX",
    "Limits",
    "PortLimits",
]

SEED_MAX = 2**53 - 1
"""The largest range of integers that JavaScript represents exactly."""

RANDOM_SEED = -1
"""The seed that means a random one, as in most programs for diffusion models."""

GUIDANCE_SCALE_MAX = 100.0

LORAS_MAX = 8
"""LoRAs of one request."""

LORA_SCALE_MAX = 10.0
"""Also the smallest, with a minus."""

PREVIEW_EVERY_STEPS_MAX = 1000
PREVIEW_INTERVAL_MAX = 60.0
"""Seconds."""

PREVIEW_EDGE_MIN = 16
"""Pixels."""

JPEG_QUALITY_MAX = 95
"""Pillow advises against higher values: files grow a lot and images hardly improve."""

WEBP_QUALITY_MAX = 100

GRACE_SECONDS_MAX = 3600.0
REQUEST_ID_CHARS_MAX = 128
GROUP_CHARS_MAX = 128

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 100
"""Generations in one response to `ListGenerations`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits and preview defaults that the operator sets.

    Attributes:
        max_pixels: Width times height of the image that the model draws.
        max_output_pixels: Width times height of a final image that was scaled.
        max_step_count: Denoising steps.
        max_prompt_chars: Characters in the prompt, and in the negative prompt.
        max_preview_edge: Longer edge of a preview, in pixels.
        max_preview_quality: JPEG quality of a preview, up to 95.
        preview: Options of requests that set none.
        preview_methods: Methods that requests may choose. AUTO and NONE are always allowed.
    """

    max_pixels: int = 2048 * 2048
    max_output_pixels: int = 2048 * 2048
    max_step_count: int = 150
    max_prompt_chars: int = 4000
    max_preview_edge: int = 1024
    max_preview_quality: int = JPEG_QUALITY_MAX
    preview: PreviewOptions = field(default_factory=PreviewOptions)
    preview_methods: frozenset[PreviewMethod] = frozenset(RENDERED_PREVIEW_METHODS)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class PortLimits:
    """Limits on the resources that clients use. `settings.WebSettings` describes each field."""

    max_request_bytes: int = 64 * 1024
    max_metadata_bytes: int = 16 * 1024
    max_connections: int = 1000
    max_connections_per_peer: int = 256
    max_calls_per_peer: int = 256
    request_seconds: float = 10.0
    stall_seconds: float = 20.0
    idle_seconds: float = 300.0
    keepalive_seconds: float = 20.0
    keepalive_timeout_seconds: float = 10.0
    handover_seconds: float = 0.0


PORT_LIMITS = PortLimits()
"""The defaults."""

SIDE_PORT_LIMITS = PortLimits(
    max_connections=64, max_connections_per_peer=8, request_seconds=2.0, stall_seconds=2.0, idle_seconds=60.0
)
"""Of the ports for probes and for metrics: few connections and short timeouts, for a handful of known clients."""
