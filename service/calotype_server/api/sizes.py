"""Checks the size of a request: what the model draws, and what the caller receives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from calotype.v1 import calotype_pb2 as pb
    from calotype_server.limits import Limits
    from calotype_server.types import ModelInfo

__all__ = ["Size", "choose_size", "narrowed", "nearest_sizes", "offered_sizes"]

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""

_MAX_CROP = 2.0
"""A scaled image shows at least half of the image that the model draws."""

_LISTED = 8
"""Most supported sizes that a violation names."""


def choose_size(
    request: pb.GenerateRequest, model: ModelInfo, limits: Limits, reject: Callable[[str, str], None]
) -> tuple[Size, Size | None]:
    """Returns the size to draw, and the size to scale the image to, or None if the image is not scaled.

    Args:
        request: The request of the caller.
        model: Abilities and defaults of the model.
        limits: Limits of the operator, from `narrowed`.
        reject: Adds a violation: the name of the field and a description.
    """
    width = request.width_px if request.HasField("width_px") else model.width
    height = request.height_px if request.HasField("height_px") else model.height
    field = "width_px" if request.HasField("width_px") or not request.HasField("height_px") else "height_px"
    requested = width, height
    if model.supports_size(*requested) and math.prod(requested) <= limits.max_pixels:
        return requested, None
    if model.scales_other_sizes:
        return _scaled(field, requested, model, limits, reject)
    multiple = model.size_multiple
    odd = [
        (name, edge)
        for name, edge in (("width_px", width), ("height_px", height))
        if edge < 1 or (edge % multiple and model.min_pixels)
    ]
    for name, edge in odd:
        reject(name, f"is {edge}, must be a positive multiple of {multiple}")
    if not odd:
        reject(field, _unsupported(requested, model, limits))
    return requested, None


def narrowed(limits: Limits, model: ModelInfo) -> Limits:
    """Returns limits with the largest image that the model draws well and the memory can hold."""
    # An image of the default size is always allowed: the server generates one when it starts.
    default = model.width * model.height
    fitting = [limits.max_pixels]
    if model.memory is not None:
        fitting.append(max(model.memory.max_pixels, default))
    own = [math.prod(size) for size in model.sizes]
    if not model.min_pixels:
        fitting.append(max([default, *own]))
    elif model.max_pixels is not None:
        fitting.append(max([default, model.max_pixels, *own]))
    return replace(limits, max_pixels=min(fitting))


def offered_sizes(model: ModelInfo, limits: Limits) -> tuple[Size, ...]:
    """Returns those of the model's sizes that are within the limits."""
    return tuple(size for size in model.sizes if math.prod(size) <= limits.max_pixels)


def nearest_sizes(requested: Size, model: ModelInfo, limits: Limits) -> list[Size]:
    """Returns supported sizes within the limits: the nearest first, by aspect ratio, then by area.

    Empty if the operator's limit is below every size of the model.

    Args:
        requested: Positive width and height.
        model: Abilities and defaults of the model.
        limits: Limits of the operator, from `narrowed`.
    """

    def distance(size: Size) -> tuple[float, float, Size]:
        ratio = abs(math.log(_ratio(size) / _ratio(requested)))
        # Edges are rounded to multiples, so that equal ratios differ slightly.
        return round(ratio, 2), abs(math.log(math.prod(size) / math.prod(requested))), size

    in_range = sorted(_in_range(requested, model, limits), key=distance)
    candidates = {*offered_sizes(model, limits), *in_range[:1]}
    return sorted(candidates, key=distance)


def _scaled(
    field: str, requested: Size, model: ModelInfo, limits: Limits, reject: Callable[[str, str], None]
) -> tuple[Size, Size | None]:
    width, height = requested
    for name, edge in (("width_px", width), ("height_px", height)):
        if edge < 1:
            reject(name, f"is {edge}, must be 1 or more")
    if min(requested) < 1:
        return requested, None
    nearest = nearest_sizes(requested, model, limits)
    if width * height > limits.max_output_pixels:
        reject(field, f"{width}x{height} has {width * height} pixels, the maximum is {limits.max_output_pixels}")
    elif not nearest:
        reject(field, _unsupported(requested, model, limits))
    elif abs(math.log(_ratio(nearest[0]) / _ratio(requested))) > math.log(_MAX_CROP):
        shape = "wide" if _ratio(requested) > _ratio(nearest[0]) else "tall"
        reject(
            field,
            f"{width}x{height} is too {shape} to be cropped from the nearest supported size, {_text(nearest[0])}",
        )
    else:
        return nearest[0], requested
    return requested, None


def _unsupported(requested: Size, model: ModelInfo, limits: Limits) -> str:
    """Returns the description of the violation: why the size is not supported, and which sizes are."""
    width, height = requested
    nearest = nearest_sizes(requested, model, limits)
    named = ", ".join(map(_text, nearest[:_LISTED])) + (", ..." if len(nearest) > _LISTED else "")
    reason = f"{width}x{height} is not a size that the model supports"
    if width * height > limits.max_pixels and (model.min_pixels or model.supports_size(width, height)):
        reason = f"{width}x{height} has {width * height} pixels, the maximum is {limits.max_pixels}"
    if len(nearest) == 1:
        kind = "nearest" if model.min_pixels else "only"
        return f"{reason}; the {kind} supported size is {named}"
    return f"{reason}; the nearest supported sizes are {named}" if nearest else reason


def _in_range(requested: Size, model: ModelInfo, limits: Limits) -> Iterable[Size]:
    """Yields the sizes of the model's range around the nearest one."""
    if not model.min_pixels:
        return
    multiple, most = model.size_multiple, min(limits.max_pixels, model.max_pixels or limits.max_pixels)
    ratio = min(max(_ratio(requested), 1 / model.max_aspect_ratio), model.max_aspect_ratio)
    area = min(max(math.prod(requested), model.min_pixels), most)
    edges = math.sqrt(area * ratio), math.sqrt(area / ratio)
    widths, heights = ({int(edge // multiple + more) * multiple for more in (-1, 0, 1, 2)} for edge in edges)
    for width in widths:
        for height in heights:
            if min(width, height) > 0 and width * height <= most and model.supports_size(width, height):
                yield width, height


def _ratio(size: Size) -> float:
    return size[0] / size[1]


def _text(size: Size) -> str:
    return "{}x{}".format(*size)
