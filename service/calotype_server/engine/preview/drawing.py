"""Turns predicted x0 into pixels: everything that the device computes for previews of one kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from calotype_server.types import Pixels

if TYPE_CHECKING:
    from calotype_server.engine.preview.decoders import Decoder

__all__ = ["Drawing", "draw", "to_bytes", "to_pixels"]


class Drawing(NamedTuple):
    """Images on the device, computed or only launched.

    Attributes:
        images: (batch, 3, rows, columns), 0 to 1.
        sums: (batch, 2): the sums of each row's latents and image. They are finite if all values are.
    """

    images: torch.Tensor
    sums: torch.Tensor

    def finite(self) -> list[list[bool]]:
        """Returns for each row whether its latents and its image are finite. It waits for the device, once."""
        found: list[list[bool]] = torch.isfinite(self.sums).tolist()
        return found


def draw(decoder: Decoder, latents: torch.Tensor, width: int, height: int) -> Drawing:
    """Decodes latents; see `Decoder.decode`. It does not wait for the device unless the decoder does."""
    images = decoder.decode(latents, width, height)
    return Drawing(images, torch.stack([_sums(latents), _sums(images)], dim=1))


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Returns images, (batch, 3, rows, columns), 0 to 1, as (batch, rows, columns, 3) with values from 0 to 255."""
    # Few operations: each takes the interpreter's lock, which delays the denoiser's thread.
    return images.permute(0, 2, 3, 1).mul(255).round_().clamp_(0, 255).to(torch.uint8).contiguous()


def to_pixels(images: torch.Tensor) -> list[Pixels]:
    """Returns the rows of (batch, 3, rows, columns), 0 to 1. It waits for the device, once."""
    values = to_bytes(images).cpu().numpy()
    _, height, width, _ = values.shape
    return [Pixels(width, height, image.tobytes()) for image in values]


def _sums(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.flatten(1).sum(1, dtype=torch.float32)
