"""Distil the full decoder into the tiny one, in one process. Resumes from its checkpoint, and exports the weights."""

import argparse
import json
import shutil
from pathlib import Path

import autoencoder
import muon
import tiny_vae
import torch
import training
from torch import Tensor

BATCH = 8
SEED = 4
LEAK = 0.1  # slope outside -1 … 1


def leaky_clamp(pictures: Tensor) -> Tensor:
    """Clamp to -1 … 1 with a small slope outside. The output is clamped later, so white needs no exact value."""
    inside = pictures.clamp(-1, 1)
    return inside + LEAK * (pictures - inside)


def save(weights: dict[str, Tensor], folder: Path) -> None:
    """Write the decoder's averaged weights as a folder that `AutoencoderTiny.from_pretrained` loads (fp16)."""
    model = tiny_vae.build()
    model.decoder.load_state_dict(weights)
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["block_out_channels"]  # the class writes it, but warns when it reads it
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument("--samples", type=int, required=True, help="total number of images to train on")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pairs = torch.load(options.work / tiny_vae.PAIRS, weights_only=True)
    decoder = tiny_vae.build().decoder.to(memory_format=torch.channels_last)
    last = f"layers.{len(decoder.layers) - 1}."
    optimizers = muon.MuonAndAdamW(decoder, options.rate, ends=("layers.0.", last))
    ema = training.Ema(decoder, decay=0.998)
    checkpoint = training.Checkpoint(options.work / "tiny_vae.pt", decoder, ema, optimizers)
    samples = checkpoint.load()
    log = training.Log(options.work / "tiny_vae.csv", ["loss", "psnr"])
    while samples < options.samples:
        rate = training.learning_rate(samples, options.samples, options.rate, warmup=1000, hold=0.3)
        indices = training.batch_indices(samples, BATCH, len(pairs["latents"]), SEED)
        z = pairs["latents"][indices].float().contiguous(memory_format=torch.channels_last)
        x = autoencoder.to_float(pairs["pictures"][indices])
        with torch.autocast("cpu", torch.bfloat16):
            y = decoder(z)
        y = leaky_clamp(y.float())
        loss = autoencoder.reconstruction_loss(y, x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizers.step(rate)
        ema.update(decoder)
        samples += BATCH
        error = (y.detach().clamp(-1, 1) - x).square().mean().item()
        log.add(samples, rate, [loss.item(), autoencoder.psnr(error)])
        if checkpoint.due() or samples >= options.samples:
            checkpoint.save(samples)
    save(ema.weights, options.output)


if __name__ == "__main__":
    main()
