"""Defaults of the operator and of a model folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    def or_else(self, other: Defaults) -> Defaults:
        """Returns these defaults, with the values of `other` where these are None."""
        return Defaults(
            other.step_count if self.step_count is None else self.step_count,
            other.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            other.tiny_vae if self.tiny_vae is None else self.tiny_vae,
        )


def read_defaults(source: Path | str) -> Defaults:
    """Reads `calotype.json` in a local model folder, or beside a single file: defaults that suit its weights.

    Keys: `step_count`, `guidance_scale`, and `tiny_vae`, the path of an `AutoencoderTiny` for previews, relative to the
    folder. diffusers cannot store them: a pipeline class has one set of defaults for all weights.

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
        tiny_vae = values.get("tiny_vae")
        if step_count is not None and not (type(step_count) is int and step_count >= 1):
            raise ValueError("step_count must be a whole number from 1")
        if guidance is not None and not (isinstance(guidance, (int, float)) and math.isfinite(guidance)):
            raise ValueError("guidance_scale must be a finite number")
        if tiny_vae is not None and not isinstance(tiny_vae, str):
            raise ValueError("tiny_vae must be the path of a folder")
    except FileNotFoundError:
        return Defaults()
    except (ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{str(file)!r} is damaged ({error}); correct or delete it.") from error
    return Defaults(step_count, guidance, None if tiny_vae is None else str(folder / tiny_vae))
