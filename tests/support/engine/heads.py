"""Decoders with known weights, and the statistics that a preview head gets from them."""

from __future__ import annotations

import torch
from torch.nn import functional

from calotype_server.engine.preview.head import PreviewHead


def seeded(seed=0):
    """Returns a generator that always gives the same random numbers."""
    return torch.Generator().manual_seed(seed)


def linear_decoder(scale=2, channels=4):
    """Returns a decoder that a head can match: a 3x3 convolution from latents to pixels, mostly within 0 to 1."""
    random = seeded(99)
    weight = 0.02 * torch.randn(3 * scale**2, channels, 3, 3, generator=random)
    bias = 0.5 + 0.05 * torch.randn(3 * scale**2, generator=random)

    def decode(latents):
        padded = functional.pad(latents, (1, 1, 1, 1), mode="replicate")
        return functional.pixel_shuffle(functional.conv2d(padded, weight, bias), scale)

    return decode


def observed(decode, *seeds, noise=0.0, side=16):
    """Returns the statistics of one random image for each seed."""
    statistics = None
    for seed in seeds:
        random = seeded(seed)
        latents = torch.randn(1, 4, side, side, generator=random)
        images = decode(latents)
        images = images + noise * torch.randn(images.shape, generator=random)
        seen = PreviewHead.observe(2, latents, images)
        statistics = seen if statistics is None else statistics + seen
    return statistics


def error(head, decode):
    """Returns the mean squared error of a head on an image that it was not fitted to."""
    latents = torch.randn(1, 4, 16, 16, generator=seeded(1000))
    return float(((head.decode(latents, 32, 32) - decode(latents).clamp(0, 1)) ** 2).mean())
