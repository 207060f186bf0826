"""Finish the autoencoder: normalise its latents exactly, and cache them for the training of the UNet."""

import argparse
from pathlib import Path

import autoencoder
import data
import torch
from diffusers import AutoencoderKL
from torch import Tensor


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the mean latents of uint8 images (N x 3 x 128 x 128)."""
    batches = images.split(32)
    return torch.cat([model.encode(autoencoder.to_float(batch)).latent_dist.mean for batch in batches])


@torch.no_grad()
def fold_normalisation(model: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Change the 1 x 1 convolutions next to the latents so that the latents become (z - mean) / deviation.

    Decoded images stay the same, and the shipped model needs no scaling factor other than 1.
    """
    channels = len(mean)
    encoder, decoder = model.quant_conv, model.post_quant_conv
    encoder.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) / deviation
    encoder.bias[channels:] -= 2 * deviation.log()  # the other half contains the logarithms of the variances
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= deviation.view(1, -1, 1, 1)


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderKL, images: Tensor, latents: Tensor) -> float:
    """Return the PSNR in dB over full-size images, rounded to 8 bits."""
    error = 0.0
    for picture, latent in zip(images.split(32), latents.split(32), strict=True):
        output = model.decode(latent).sample.clamp(-1, 1)
        rounded = ((output + 1) * 127.5).round() / 127.5 - 1
        error += (rounded - autoencoder.to_float(picture)).square().mean().item() * len(picture)
    return autoencoder.psnr(error / len(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(2)
    model = autoencoder.build().eval()
    model.load_state_dict(torch.load(options.work / "autoencoder.pt", weights_only=True)["ema"])
    images = torch.from_numpy(data.load(options.work).images).permute(0, 3, 1, 2).contiguous()
    latents = encode(model, images)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    fold_normalisation(model, mean, deviation)
    latents = (latents - mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
    model.register_to_config(scaling_factor=1.0)
    model.save_pretrained(options.work / "vae")
    torch.save(latents.half(), options.work / "latents.pt")
    print("deviations", [round(value, 2) for value in deviation.tolist()])
    print(f"folded: largest difference {(encode(model, images[:64]) - latents[:64]).abs().max().item():.1e}")
    print(f"{reconstruction_psnr(model, images, latents):.2f} dB PSNR on {len(images)} whole images")


if __name__ == "__main__":
    main()
