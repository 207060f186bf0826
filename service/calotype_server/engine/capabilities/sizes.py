"""Reads the sizes of images that a pipeline draws."""

from __future__ import annotations

from typing import Any

__all__ = ["native_size", "size_multiple"]


def size_multiple(pipeline: Any, denoiser: Any) -> int:
    """Returns the number of pixels that widths and heights must be multiples of."""
    factor = getattr(pipeline, "vae_scale_factor", 8)
    patch = denoiser.config.get("patch_size", 1)
    patched = factor * (patch if isinstance(patch, int) else 1)
    processor = getattr(pipeline, "image_processor", None)
    # FLUX and similar models pack 2x2 latents outside the transformer; only their image processor shows it.
    processed = processor.config.get("vae_scale_factor", 1) if processor is not None else 1
    # Kandinsky rounds the edges of the latents up to multiples of 8.
    rounded = factor * 8 if getattr(pipeline, "movq", None) is not None else 1
    return max(patched, processed, rounded)


def native_size(pipeline: Any, denoiser: Any, multiple: int) -> tuple[int, int]:
    """Returns the width and height that the model was trained with, in pixels, as multiples of `multiple`."""
    size = getattr(pipeline, "default_sample_size", None) or denoiser.config.get("sample_size") or 128
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    factor = getattr(pipeline, "vae_scale_factor", 8)
    return tuple(max(multiple, side * factor // multiple * multiple) for side in (width, height))
