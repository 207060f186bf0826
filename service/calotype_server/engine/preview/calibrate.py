"""Fits a `PreviewHead` at load, with no pictures at hand: by planted latents.

Random latents with the spatial statistics of natural images are put in the place of the scheduler's result in a
one-step call, and the pipeline decodes them as it would its own: unpacking, unscaling, VAE and post-processing are the
pipeline's, so nothing about its layout has to be known here.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from calotype_server.engine.batching.proxy import DenoiserProxy
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.preview.head import PreviewHead, to_grid
from calotype_server.engine.probe import plain_arguments
from calotype_server.engine.view import make_scheduler, request_view

if TYPE_CHECKING:
    from calotype_server.engine.preview.head import HeadStatistics
    from calotype_server.types import ModelInfo

__all__ = ["calibrate", "decode_planted", "multiscale_noise"]

_PICTURES = 24
"""Beyond it more pictures gain little: R2 was .71 with 4, .79 with 8, .81 with 16, .82 with 32."""

_FEWEST_PICTURES = 4
_MAX_CELLS = 32
"""Longer side of the planted latents: the head is a convolution, so what it learns holds for every size."""

_LONGEST_EDGE = 256
"""Of a preview, where the latents are large enough; the head of a small model draws full size."""


def calibrate(pipeline: Any, model: ModelInfo, *, seed: int = 0, budget: float = 20.0) -> PreviewHead:
    """Returns a head fitted to the pipeline's own decoder.

    Args:
        pipeline: Not changed.
        model: Its description.
        seed: Of the planted latents; the same seed gives the same head.
        budget: Seconds after which fewer pictures must do.
    """
    deadline = time.monotonic() + budget
    edge = min(model.width, model.size_multiple * _MAX_CELLS)
    call = plain_arguments(pipeline, edge, guidance_scale=1.0)
    denoiser = denoiser_name(pipeline)
    # What the denoiser says is thrown away, so once is enough.
    replaced = {denoiser: _first_answer(getattr(pipeline, denoiser))}
    _, shape = decode_planted(pipeline, None, call, **replaced)
    generator = torch.Generator().manual_seed(seed)
    statistics: HeadStatistics | None = None
    scale = 0
    for number in range(_PICTURES):
        if number >= _FEWEST_PICTURES and time.monotonic() > deadline:
            break
        latents = multiscale_noise(shape, generator)
        images, _ = decode_planted(pipeline, latents, call, **replaced)
        cells = edge // max(to_grid(latents, edge, edge).shape[-2:])
        native = max(model.width, model.height) // cells
        scale = scale or _scale(native, cells)
        seen = PreviewHead.observe(scale, latents, images)
        statistics = seen if statistics is None else statistics + seen
    assert statistics is not None
    return PreviewHead(scale, statistics)


def multiscale_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Returns random latents of unit variance whose spectrum falls as in natural images (about 1/f).

    White noise would not do: a decoder answers texture quite differently from shapes.

    Args:
        shape: Of the scheduler's sample, for a square picture: any layout that `to_grid` takes.
        generator: Source of randomness.
    """
    grid_shape = to_grid(torch.empty(shape, device="meta"), 1, 1).shape
    batch, channels, rows, columns = grid_shape
    grid = torch.zeros(grid_shape)
    size = 2
    while size < 2 * max(rows, columns):
        height, width = min(size, rows), min(size, columns)
        noise = torch.randn(batch, channels, height, width, generator=generator)
        grid += (0.5 if size <= 8 else 0.35) * functional.interpolate(noise, size=(rows, columns), mode="bilinear")
        size *= 2
    grid /= grid.std()
    if len(shape) == 3:
        return grid.flatten(2).transpose(1, 2).contiguous()
    return grid.unsqueeze(2) if len(shape) == 5 else grid


def decode_planted(
    pipeline: Any, latents: torch.Tensor | None, call: dict[str, Any], **replaced: Any
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Runs the pipeline's own tail on latents in the scheduler's space.

    Args:
        pipeline: Not changed.
        latents: As the scheduler would return them; None leaves the scheduler's own.
        call: Arguments of the call, but for the number of steps and the output type.
        replaced: Components to put in place of the pipeline's.

    Returns:
        The pictures, (batch, 3, height, width) from 0 to 1, and the shape of the scheduler's sample.
    """
    scheduler = make_scheduler(pipeline, type(pipeline.scheduler).__name__)
    step = scheduler.step
    shape: tuple[int, ...] = ()

    @functools.wraps(step)
    def planted(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal shape
        shape = tuple(sample.shape)
        return_dict = kwargs.pop("return_dict", True)
        output = step(model_output, timestep, sample, *args, **kwargs, return_dict=True)
        if latents is not None:
            # Consistency models decode `denoised`, not `prev_sample`.
            for name in ("prev_sample", "denoised", "pred_original_sample"):
                if getattr(output, name, None) is not None:
                    output[name] = latents.to(sample)
        return output if return_dict else output.to_tuple()

    scheduler.step = planted
    view = request_view(pipeline, scheduler, **replaced)
    # Second-order schedulers need two steps, and distilled models insist on two or four.
    attempts = [1, 2, 4] if getattr(scheduler, "order", 1) == 1 else [2, 4]
    for steps in attempts:
        try:
            return view(**call, num_inference_steps=steps, output_type="pt")[0].float(), shape
        except ValueError:
            if steps == attempts[-1]:
                raise
    raise AssertionError("unreachable")


def _first_answer(module: Any) -> DenoiserProxy:
    """A module that computes its first answer and repeats it."""
    answers: list[Any] = []

    def answer(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            answers.append(module(*args, **kwargs))
        return answers[0]

    return DenoiserProxy(module, answer)


def _scale(cells: int, cell_edge: int) -> int:
    """Pixels per cell: a power of two, so that a native preview is at most 256 px and never larger than the image."""
    scale = 1
    while 2 * scale <= cell_edge and cells * 2 * scale <= _LONGEST_EDGE:
        scale *= 2
    return scale
