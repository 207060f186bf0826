"""Suggests the right names for unknown fields: many callers know those of other programs."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["SYNONYMS", "suggested_field"]

SYNONYMS: Final[Mapping[str, tuple[str, ...]]] = {
    "batchsize": ("n",),
    "cfg": ("guidance_scale",),
    "cfgscale": ("guidance_scale",),
    "count": ("n",),
    "format": ("output_format", "output"),
    "guidance": ("guidance_scale",),
    "height": ("height_px", "size"),
    "imageformat": ("output_format", "output"),
    "inferencesteps": ("step_count",),
    "lora": ("loras",),
    "negative": ("negative_prompt",),
    "niter": ("n",),
    "noiseschedule": ("sigmas",),
    "noiseseed": ("seed",),
    "numimages": ("n",),
    "numimagesperprompt": ("n",),
    "numinferencesteps": ("step_count",),
    "numsteps": ("step_count",),
    "quality": ("output",),
    "randomseed": ("seed",),
    "sampler": ("scheduler",),
    "samplerindex": ("scheduler",),
    "samplername": ("scheduler",),
    "samplingmethod": ("scheduler",),
    "samplingsteps": ("step_count",),
    "scheduletype": ("sigmas",),
    "size": ("width_px",),
    "steps": ("step_count",),
    "text": ("prompt",),
    "timestepspacing": ("spacing",),
    "usekarrassigmas": ("sigmas",),
    "width": ("width_px", "size"),
}
"""Names in other programs, without case and separators, and the fields that may be meant, the best one first."""

_SIMILAR: Final = 0.75
"""Least similarity of a name that is suggested because of its spelling."""


def suggested_field(name: str, fields: Iterable[str]) -> str | None:
    """Returns which of these fields is probably meant by an unknown one, or None."""
    key = _key(name)
    by_key = {_key(field): field for field in fields}
    for synonym in SYNONYMS.get(key, ()):
        if synonym in by_key.values():
            return synonym
    close = difflib.get_close_matches(key, by_key, n=1, cutoff=_SIMILAR)
    return by_key[close[0]] if close else None


def _key(name: str) -> str:
    """Returns a name without case and separators, so that camelCase equals snake_case."""
    return name[:80].casefold().replace("_", "").replace("-", "")
