"""The tiny decoder for previews (an `AutoencoderTiny` that replaces the full autoencoder), and its training pairs.

A pair is a latent and the full decoder's image of it. Final images alone are not enough: early predictions, which
previews show, are blurred, and no image encodes to such latents.
"""

import argparse
from pathlib import Path

import autoencoder
import data
import evaluate
import latents
import predictions
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 16  # channels
BLOCKS = (3, 2, 2, 0)  # at 16, 32, 64 and 128 px

PAIRS = "tiny_vae_pairs.pt"
RUNS = 400
RUNS_AT_ONCE = 20
STRIDE = 3  # use every nth step of a run, and the last
SHIFT = 12  # maximum shift in each direction, in pixels
SEED = 3


def build() -> AutoencoderTiny:
    """Return an untrained autoencoder of 12 latent channels and factor 8.

    `DecoderTiny` has one width for all resolutions, and layers with many pixels take the most time. So the decoder is
    narrow, and most blocks are at low resolutions. The class requires an encoder; its weights are zero.
    """
    model = AutoencoderTiny(
        latent_channels=autoencoder.LATENT_CHANNELS,
        encoder_block_out_channels=(1,) * len(BLOCKS),
        num_encoder_blocks=(0,) * len(BLOCKS),
        decoder_block_out_channels=(WIDTH,) * len(BLOCKS),
        num_decoder_blocks=BLOCKS,
        scaling_factor=1.0,  # same as the full autoencoder, so that one can replace the other
    )
    for parameter in model.encoder.parameters():
        nn.init.zeros_(parameter)
    return model


def to_bytes(pictures: Tensor) -> Tensor:
    """Map images in the model's range to uint8, like a pipeline."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()


@torch.no_grad()
def decode(vae: AutoencoderKL | AutoencoderTiny, z: Tensor) -> Tensor:
    """Return the images (uint8, N x 3 x 128 x 128) of latents in the scheduler's scale."""
    return torch.cat([to_bytes(vae.decode(batch / vae.config.scaling_factor).sample) for batch in z.split(16)])


def predicted(pipeline: DiffusionPipeline, names: list[str]) -> Tensor:
    """Return predictions of real runs, at different steps in each batch, and their final latents."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(SEED))[:RUNS]
    found = []
    for number, batch in enumerate(order.split(RUNS_AT_ONCE)):
        prompts = [names[index].lower() for index in batch.tolist()]
        with torch.autocast("cpu", torch.bfloat16):  # the choice of latents matters little
            steps = predictions.predicted_latents(pipeline, prompts, SEED + number)
        found += [steps[number % STRIDE : -1 : STRIDE].flatten(0, 1), steps[-1]]
    return torch.cat(found)


def moved(images: Tensor) -> Tensor:
    """Return uint8 images mirrored and shifted, with white at the edges."""
    source = torch.Generator().manual_seed(SEED)
    padded = functional.pad(images.flip(-1), (SHIFT,) * 4, value=255)
    offsets = torch.randint(0, 2 * SHIFT + 1, (len(images), 2), generator=source).tolist()
    pairs = zip(padded, offsets, strict=True)
    return torch.stack([image[:, top : top + data.SIZE, left : left + data.SIZE] for image, (top, left) in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of the exported pipeline")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, _ = evaluate.load(options.model)
    dataset = data.load(options.work)
    images = torch.from_numpy(dataset.images).permute(0, 3, 1, 2).contiguous()
    parts = [
        latents.encode(pipeline.vae, images),
        latents.encode(pipeline.vae, moved(images)),
        predicted(pipeline, dataset.names),
    ]
    z = torch.cat(parts).half()
    torch.save({"latents": z, "pictures": decode(pipeline.vae, z.float())}, options.work / PAIRS)
    print(" + ".join(str(len(part)) for part in parts), "pairs")


if __name__ == "__main__":
    main()
