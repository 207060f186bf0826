"""The autoencoder: a plain f8 `AutoencoderKL`, its loss and its quality measure."""

import math

from diffusers import AutoencoderKL
from torch import Tensor

LATENT_CHANNELS = 12
FACTOR = 8  # pixels per latent position, in each direction


def build() -> AutoencoderKL:
    """Return an untrained autoencoder.

    It has no attention in the middle block, so it is purely local: training on crops is as good as on full-size images
    and costs a fraction.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(24, 48, 96, 160),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=128,
        mid_block_add_attention=False,
    )


def to_float(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to the model's range, -1 … 1."""
    return pixels.float() / 127.5 - 1


def gradient_error(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean absolute difference of horizontal plus vertical pixel gradients, which keeps outlines sharp."""
    difference = a - b
    return (difference[..., 1:] - difference[..., :-1]).abs().mean() + (
        difference[..., 1:, :] - difference[..., :-1, :]
    ).abs().mean()


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return L1 + gradient L1 + mean squared error."""
    return (output - target).abs().mean() + gradient_error(output, target) + (output - target).square().mean()


def psnr(mean_square_error: float) -> float:
    """Return the peak signal-to-noise ratio in dB for values in -1 … 1 (peak to peak 2, hence the 4)."""
    return 10 * math.log10(4 / mean_square_error)
