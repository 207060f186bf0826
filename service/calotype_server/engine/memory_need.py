"""Measures, when the model is loaded, how much memory generations need, so that admission can keep within the limits.

A denoiser call and a whole generation of few steps run at the default size and at half of its edges. Convolutions need
memory in proportion to the pixels. Attention that stores its whole matrix grows with their square: that part shows in
the difference of both sizes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
import torch

from calotype_server.engine.batching.plan import PlanOptions
from calotype_server.engine.batching.plan_cache import plan_facts
from calotype_server.engine.capabilities import decoder
from calotype_server.engine.capabilities.sizes import draws_exactly
from calotype_server.engine.disk_cache import config_of, facts_path, load_checked, save_checked
from calotype_server.engine.memory import free_memory, is_device_failure, peak_memory
from calotype_server.engine.requests.sample_calls import denoiser_call, plain_arguments
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.types import MemoryModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from calotype_server.types import ModelInfo

__all__ = ["extrapolation", "memory_model"]

_log = structlog.get_logger(__name__)

_FORMAT = 1
"""Part of the key: increase it when the measurement or the file changes its meaning."""

_SAFETY = 1.5
"""Factor on measurements, which do not include memory that operations use internally. The resident memory of the
bundled model was up to 1.05 times the measurement, for one to eight images of 512 to 2048 pixels width at once."""

_HEADROOM = 256 * 2**20
"""Bytes that generations do not get: caches and threads that come later, and fragmentation."""

_GUIDED = 2.0
"""A guidance scale with which pipelines compute two rows for each image."""


def memory_model(
    pipeline: Any, model: ModelInfo, *, cache_dir: Path, limit: int | None = None, reserved: int = 0
) -> MemoryModel | None:
    """Returns how much memory generations need and have, or None if that is not limited or cannot be measured.

    Args:
        pipeline: The loaded pipeline; not changed.
        model: Its description.
        cache_dir: Folder of all caches; measurements are in `memory` below it.
        limit: Bytes that all running generations may use together; None for the memory that is free now.
        reserved: Bytes that the process will use for other purposes; ignored if there is a `limit`.
    """
    device = torch.device(model.device)
    if model.offload == "model":
        # Weights come and go during a generation, and generations run one after another.
        _log.info("the memory of a generation is not measured, because weights move")
        return None
    available = limit
    if available is None:
        free = free_memory(device)
        available = None if free is None else max(1, free - _HEADROOM - (reserved if device.type == "cpu" else 0))
    if not available:
        return None
    if device.type not in ("cpu", "cuda", "xpu"):
        _log.warning(
            "the memory of a generation cannot be measured on this device; it is not limited", device=str(device)
        )
        return None
    try:
        denoising, whole = _find_need(pipeline, model, device, cache_dir)
    except Exception as error:
        if is_device_failure(error):
            raise
        _log.exception("the memory of a generation cannot be measured; it is not limited")
        return None
    found = MemoryModel(available, denoising, whole)
    _log.info("memory", available=available, default_size=found.need([model.width * model.height]))
    return found


def extrapolation(points: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Returns bytes per pixel and per squared pixel, with a margin.

    Args:
        points: Pixels and measured bytes, at one or two sizes, the larger one last.
    """
    (fewer, less), (pixels, most) = points[0], points[-1]
    growth = (most / pixels - less / fewer) / (pixels - fewer) if pixels > fewer else 0.0
    square = max(0.0, growth)
    return _SAFETY * (most / pixels - square * pixels), _SAFETY * square


def _find_need(
    pipeline: Any, model: ModelInfo, device: torch.device, cache_dir: Path
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the extrapolations of a denoiser call and of a whole generation, from the cache or measured."""
    facts = plan_facts(pipeline, model, PlanOptions()) | {
        "memory_format": _FORMAT,
        "vae": {name: str(value) for name, value in config_of(decoder(pipeline)).items()},
    }
    path = facts_path(cache_dir, "memory", facts)
    points = load_checked(path, facts, _decode, key="bytes", kind="memory measurement")
    if points is None:
        points = _measure(pipeline, model, device)
        save_checked(path, facts, points, key="bytes", kind="memory measurement")
    return extrapolation([(p, d) for p, d, _ in points]), extrapolation([(p, w) for p, _, w in points])


def _measure(pipeline: Any, model: ModelInfo, device: torch.device) -> list[list[int]]:
    """Returns pixels, bytes of a denoiser call, and bytes of a whole generation, at one or two sizes."""
    guidance = None if model.guidance_scale is None else max(_GUIDED, model.guidance_scale)
    guided = replace(model, guidance_scale=guidance)
    points = []
    # Some pipelines draw only their own sizes; then memory grows in proportion to the pixels.
    sizes = [size for size in (_half(model),) if draws_exactly(pipeline, *size)]
    for width, height in dict.fromkeys([*sizes, (model.width, model.height)]):
        sized = replace(guided, width=width, height=height)
        denoising = peak_memory(denoiser_call(pipeline, sized), device)
        points.append([width * height, denoising, peak_memory(_generation(pipeline, sized), device)])
    return points


def _half(model: ModelInfo) -> tuple[int, int]:
    multiple = model.size_multiple
    width, height = (max(multiple, edge // 2 // multiple * multiple) for edge in (model.width, model.height))
    return width, height


def _generation(pipeline: Any, model: ModelInfo) -> Callable[[], Any]:
    arguments = plain_arguments(pipeline, model.width, model.height, model.guidance_scale)
    steps = min(2, model.step_count)

    @torch.no_grad()
    def call() -> Any:
        view = request_view(pipeline, make_scheduler(pipeline, model.scheduler))
        return view(**arguments, num_inference_steps=steps, output_type="pt")

    return call


def _decode(stored: Any) -> list[list[int]]:
    """Raises an exception of any kind if these are not one or two measurements."""
    points = [[int(value) for value in point] for point in stored]
    if len(points) not in (1, 2) or any(len(point) != 3 or min(point) < 1 for point in points):
        raise ValueError("these are not measurements")
    return points
