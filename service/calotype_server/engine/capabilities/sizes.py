"""Finds the sizes of images that a pipeline draws well.

A pipeline with a table of sizes in its own code supports the sizes of the table. For all others, `_RANGES` states how
far an image may differ from the native size.
"""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calotype_server.engine.capabilities.components import denoiser_name
from calotype_server.errors import ModelUnavailable
from calotype_server.types import OtherSizes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from calotype_server.engine.capabilities.defaults import Defaults

__all__ = ["SupportedSizes", "draws_exactly", "native_size", "size_multiple", "supported_sizes"]

Size = tuple[int, int]
"""Width and height in pixels."""

_RATIOS = (4 / 3, 3 / 2, 16 / 9)
"""Aspect ratios to list in addition to the native one, in both orientations. With `_STEPS`, they give the training
sizes of SDXL and PRX that have about these ratios: 1152x896, 1216x832 and 1344x768 for 1024x1024."""

_STEPS = 16
"""Edges of listed sizes are multiples of the native edge divided by this: 64 pixels for SDXL (arXiv 2307.01952)."""


@dataclass(frozen=True, slots=True)
class _Range:
    """Sizes around the native one: minimum and maximum area relative to its area, and the maximum aspect ratio."""

    least: float
    most: float
    ratio: float


_RANGES = {
    # Trained with squares of one size: larger images repeat objects, and smaller ones lose quality. The largest is
    # 768x512, a usual size for Stable Diffusion 1.5.
    "unet": _Range(0.75, 1.5, 2.0),
    # Trained at about one area, with aspect ratios up to 4 (SDXL, arXiv 2307.01952, appendix I).
    "sdxl": _Range(0.5, 1.5, 4.0),
    # CogView4's authors state edges of 512 to 2048 pixels and at most 2**21 pixels, and FLUX.2's advise at most two
    # megapixels; both are native to one megapixel.
    "transformer": _Range(0.25, 2.0, 4.0),
}

_HIDREAM_ROUNDS = 8
"""Most attempts to find a size that HiDream draws as requested; two suffice for its native size."""


@dataclass(frozen=True, slots=True)
class SupportedSizes:
    """The attributes of `ModelInfo` with the same names. The first of `sizes` is the default size."""

    sizes: tuple[Size, ...]
    min_pixels: int = 0
    max_pixels: int | None = None
    max_aspect_ratio: float = math.inf


def size_multiple(pipeline: Any, denoiser: Any) -> int:
    """Returns the number of pixels that widths and heights must be multiples of."""
    factor = getattr(pipeline, "vae_scale_factor", 8)
    patch = denoiser.config.get("patch_size", 1)
    patched = factor * (patch if isinstance(patch, int) else 1)
    processor = getattr(pipeline, "image_processor", None)
    # FLUX and similar models pack 2x2 latents outside the transformer; only their image processor shows it.
    processed = processor.config.get("vae_scale_factor", 1) if processor is not None else 1
    # Krea 2 does so with patches of any size.
    own = getattr(pipeline, "patch_size", None)
    packed = factor * own if isinstance(own, int) else 1
    # Kandinsky 2 and 3 round up to these multiples.
    rounding = _from_module(pipeline, "downscale_height_and_width")
    rounded = 1 if rounding is None else inspect.signature(rounding).parameters["scale_factor"].default ** 2
    return max(patched, processed, packed, rounded)


def native_size(pipeline: Any, denoiser: Any, multiple: int) -> Size:
    """Returns the width and height that the model was trained with, in pixels, as multiples of `multiple`."""
    width, height = _declared_size(pipeline, denoiser)
    return max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple)


def supported_sizes(
    pipeline: Any, multiple: int, defaults: Defaults, other_sizes: OtherSizes = OtherSizes.REJECT
) -> SupportedSizes:
    """Returns the sizes that requests may choose.

    Args:
        pipeline: The loaded pipeline; not changed.
        multiple: Of pixels, from `size_multiple`.
        defaults: Sizes from the model's folder replace those found here.
        other_sizes: DRAW widens the sizes to all that the pipeline can draw.

    Raises:
        ModelUnavailable: The pipeline cannot draw a size from the model's folder.
    """
    found = _own_sizes(pipeline, multiple)
    if defaults.sizes:
        for width, height in defaults.sizes:
            if not draws_exactly(pipeline, width, height):
                kind = type(pipeline).__name__
                raise ModelUnavailable(f"calotype.json lists the size {width}x{height}, which {kind} cannot draw.")
        # Without a range in the same file, the model supports nothing else.
        found = SupportedSizes(defaults.sizes)
    if _is_restricted(pipeline):
        return found
    if defaults.min_pixels is not None:
        found = replace(found, min_pixels=defaults.min_pixels)
    if defaults.max_pixels is not None:
        found = replace(found, max_pixels=defaults.max_pixels)
    if other_sizes is OtherSizes.DRAW:
        found = replace(found, min_pixels=1, max_pixels=None, max_aspect_ratio=math.inf)
    return found


def draws_exactly(pipeline: Any, width: int, height: int) -> bool:
    """Returns whether the pipeline's image has exactly this size, in pixels."""
    multiple = size_multiple(pipeline, getattr(pipeline, denoiser_name(pipeline)))
    if min(width, height) < multiple or width % multiple or height % multiple:
        return False
    if (choices := _resolutions(pipeline)) is not None:
        return (width, height) in choices
    return not _is_hidream(pipeline) or _hidream_size(pipeline, width, height) == (width, height)


def _own_sizes(pipeline: Any, multiple: int) -> SupportedSizes:
    kind = denoiser_name(pipeline)
    denoiser = getattr(pipeline, kind)
    native = native_size(pipeline, denoiser, multiple)
    area, edge = math.prod(native), round(math.sqrt(math.prod(native)))
    table = [
        size
        for size in _table(pipeline, edge)
        if size[0] % multiple == size[1] % multiple == 0 and min(size) >= multiple
    ]
    if table:
        default = native if native in table else min(table, key=lambda size: (abs(math.log(size[0] / size[1])), size))
        return SupportedSizes(_sorted(default, table))
    if kind == "unet" and denoiser.config.get("addition_embed_type") == "text_time":
        kind = "sdxl"
    limits = _RANGES[kind]
    most, ratio = int(limits.most * area), limits.ratio
    if (longest := _longest_edge(pipeline, denoiser)) is not None:
        # The contract has no maximum edge, so area and ratio together keep the edges below it.
        most = max(area, min(most, longest**2 // 2))
        ratio = max(1.0, min(ratio, longest**2 / most))
    found = SupportedSizes((native,), max(1, int(limits.least * area)), most, max(ratio, max(native) / min(native)))
    step = max(multiple, round(edge / _STEPS / multiple) * multiple)
    listed = [
        size
        for size in _around(area, step)
        if found.min_pixels <= math.prod(size) <= most and max(size) <= ratio * min(size)
    ]
    return replace(found, sizes=_sorted(native, listed))


def _table(pipeline: Any, edge: int) -> Iterable[Size]:
    """Returns the sizes in the pipeline's own code for a model of this native edge; empty if there are none."""
    if (choices := _resolutions(pipeline)) is not None:
        return choices
    if _is_hidream(pipeline):
        return _hidream_sizes(pipeline)
    if "use_resolution_binning" in _parameters(pipeline):
        bins = _from_module(pipeline, f"ASPECT_RATIO_{edge}_BIN")
        if bins is not None:
            return [(int(width), int(height)) for height, width in bins.values()]
    shapes = _from_module(pipeline, "SUPPORTED_SHAPE") or _from_module(pipeline, "PREFERRED_KONTEXT_RESOLUTIONS") or ()
    # A model of another size has the same code, but was trained for other sizes.
    return shapes if (edge, edge) in shapes else ()


def _sorted(default: Size, sizes: Iterable[Size]) -> tuple[Size, ...]:
    """Returns the default size, and then the others from the widest to the tallest."""
    others = sorted({*sizes} - {default}, key=lambda size: (-size[0] / size[1], size))
    return default, *others


def _around(area: int, step: int) -> Iterator[Size]:
    """Yields sizes of common aspect ratios and at most this area, with edges that are multiples of `step`."""
    for ratio in _RATIOS:
        shorter = max(step, round(math.sqrt(area / ratio) / step) * step)
        longer = area // shorter // step * step
        if longer >= shorter:
            yield longer, shorter
            yield shorter, longer


def _declared_size(pipeline: Any, denoiser: Any) -> Size:
    factor = getattr(pipeline, "vae_scale_factor", 8)
    # In PRX's config the size is in pixels, in all others in latents.
    if pixels := pipeline.config.get("default_sample_size"):
        return pixels, pixels
    parameters = _parameters(pipeline)
    if "use_resolution_binning" not in parameters and all(
        type(parameters[name].default) is int for name in ("width", "height")
    ):
        # Such a default is that of the weights. With binning, the class serves models of several sizes.
        size = parameters["width"].default, parameters["height"].default
        longest = _longest_edge(pipeline, denoiser)
        if longest is None or max(size) <= longest:
            return size
    found = getattr(pipeline, "default_sample_size", None) or denoiser.config.get("sample_size") or 128
    height, width = (found, found) if isinstance(found, int) else tuple(found)[-2:]
    return width * factor, height * factor


def _longest_edge(pipeline: Any, denoiser: Any) -> int | None:
    """Returns the longest edge, in pixels, for which a transformer has positions; None if it has no such limit."""
    positions = denoiser.config.get("pos_embed_max_size")
    patch = denoiser.config.get("patch_size")
    if not isinstance(positions, int) or not isinstance(patch, int):
        return None
    if type(denoiser).__name__.startswith("AuraFlow"):
        # The number of all positions, not of those along an edge.
        positions = math.isqrt(positions)
    return positions * patch * getattr(pipeline, "vae_scale_factor", 8)


def _resolutions(pipeline: Any) -> list[Size] | None:
    """Returns the only sizes that a Kandinsky 5 pipeline draws; None for other pipelines."""
    found = getattr(pipeline, "resolutions", None)
    return list(found) if isinstance(found, list) else None


def _is_restricted(pipeline: Any) -> bool:
    """Returns whether the pipeline changes the size of every request to one of its own."""
    return _resolutions(pipeline) is not None or _is_hidream(pipeline)


def _is_hidream(pipeline: Any) -> bool:
    return any(kind.__name__ == "HiDreamImagePipeline" for kind in type(pipeline).__mro__)


def _hidream_size(pipeline: Any, width: int, height: int) -> Size:
    """Returns the size that HiDream draws for a request: the same aspect ratio at its native area, as in its code."""
    division = pipeline.vae_scale_factor * 2
    scale = math.sqrt((pipeline.default_sample_size * pipeline.vae_scale_factor) ** 2 / (width * height))
    return int(width * scale // division * division), int(height * scale // division * division)


def _hidream_sizes(pipeline: Any) -> Iterator[Size]:
    """Yields the sizes nearest to common aspect ratios that HiDream draws as requested."""
    edge = pipeline.default_sample_size * pipeline.vae_scale_factor
    division = pipeline.vae_scale_factor * 2
    for ratio in (1.0, *_RATIOS, *(1 / each for each in _RATIOS)):
        size = round(edge * math.sqrt(ratio)), round(edge / math.sqrt(ratio))
        for _ in range(_HIDREAM_ROUNDS):
            drawn = _hidream_size(pipeline, *size)
            if drawn == size:
                yield size
                break
            if min(drawn) < division:
                break
            size = drawn


def _parameters(pipeline: Any) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters


def _from_module(pipeline: Any, name: str) -> Any:
    """Returns a global variable of the module of the pipeline's class, or of a class that it inherits from."""
    for kind in type(pipeline).__mro__:
        found = getattr(sys.modules.get(kind.__module__), name, None)
        if found is not None:
            return found
    return None
