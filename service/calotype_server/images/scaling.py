"""Scales images to the requested size if the model drew another one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from calotype_server.types import Notice

if TYPE_CHECKING:
    from calotype_server.types import Job

__all__ = ["scaled", "scaled_preview", "scaling_notices"]


def scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Returns the middle of the image with the aspect ratio of `size`, in exactly this size, in pixels."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def scaled_preview(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Returns the middle of a preview with the aspect ratio of the final image's `size`.

    It is at most as large as the final image. A preview that is smaller stays so, because the client scales it anyway.
    """
    factor = min(1.0, image.width / size[0], image.height / size[1])
    width, height = (max(1, round(edge * factor)) for edge in size)
    return scaled(image, (width, height))


def scaling_notices(job: Job) -> tuple[Notice, ...]:
    """Returns a notice if the final image does not have the size that the model draws."""
    if job.output.size is None:
        return ()
    width, height = job.output.size
    # A difference of a pixel comes from rounding.
    is_cropped = abs(math.log(width * job.height / (height * job.width))) > 1 / min(width, height)
    changed = "cropped and scaled" if is_cropped else "scaled"
    drawn = f"{job.width}x{job.height}"
    message = f"The model does not support {width}x{height}. It draws {drawn}, and the image is {changed}."
    return (Notice("SIZE_SCALED", message),)
