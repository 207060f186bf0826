"""Defaults of the operator and of a model folder."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calotype_server.errors import ModelUnavailable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Defaults", "read_defaults"]


@dataclass(frozen=True, slots=True)
class Defaults:
    """Defaults that override the pipeline's own; each is None if not given."""

    step_count: int | None = None
    guidance_scale: float | None = None
    tiny_vae: str | None = None
    sizes: tuple[tuple[int, int], ...] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def or_else(self, other: Defaults) -> Defaults:
        """Returns these defaults, with the values of `other` where these are None."""
        return Defaults(
            **{
                each.name: getattr(other if getattr(self, each.name) is None else self, each.name)
                for each in dataclasses.fields(self)
            }
        )


def read_defaults(source: Path | str) -> Defaults:
    """Reads `calotype.json` in a local model folder, or beside a single file: defaults that suit its weights.

    Keys: `step_count`; `guidance_scale`; `tiny_vae`, the path of an `AutoencoderTiny` for previews, relative to the
    folder; `sizes`, a list of [width, height] in pixels that the weights draw well, the default first; `min_pixels` and
    `max_pixels`, the range of width times height of other sizes. With `sizes` but without `min_pixels`, no other sizes
    are supported. diffusers cannot store these values: a pipeline class has one set of defaults for all weights.

    Args:
        source: The folder, the single file, or a hub id, for which there is no such file.

    Raises:
        ModelUnavailable: The file is invalid.
    """
    if isinstance(source, str):
        return Defaults()
    folder = source.parent if source.is_file() else source
    file = folder / "calotype.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        step_count, guidance = values.get("step_count"), values.get("guidance_scale")
        tiny_vae, sizes = values.get("tiny_vae"), values.get("sizes")
        pixels = {name: values.get(name) for name in ("min_pixels", "max_pixels")}
        if step_count is not None and not (type(step_count) is int and step_count >= 1):
            raise ValueError("step_count must be a whole number from 1")
        if guidance is not None and not (isinstance(guidance, (int, float)) and math.isfinite(guidance)):
            raise ValueError("guidance_scale must be a finite number")
        if tiny_vae is not None and not isinstance(tiny_vae, str):
            raise ValueError("tiny_vae must be the path of a folder")
        if sizes is not None and not _are_sizes(sizes):
            raise ValueError("sizes must be a list of [width, height]")
        for name, count in pixels.items():
            if count is not None and not (type(count) is int and count >= 0):
                raise ValueError(f"{name} must be a whole number from 0")
    except FileNotFoundError:
        return Defaults()
    except (ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{str(file)!r} is damaged ({error}); correct or delete it.") from error
    return Defaults(
        step_count,
        guidance,
        None if tiny_vae is None else str(folder / tiny_vae),
        None if sizes is None else tuple((width, height) for width, height in sizes),
        **pixels,
    )


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(size, list) and len(size) == 2 and all(type(edge) is int and edge > 0 for edge in size)
            for size in value
        )
    )
