"""Compare the tiny decoder with the full one: how similar its images are, and how much faster it is.

The runs use seeds that the training did not use. The training used the names, but not the other prompts.
"""

import argparse
import json
import random
import time
from pathlib import Path

import autoencoder
import evaluate
import predictions
import reference
import sheets
import tiny_vae
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from PIL import Image
from torch import Tensor

NAMES = 48
SEED = 1000
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the steps
ROUNDS = 100


def psnr(full: Tensor, tiny: Tensor) -> float:
    """Return the PSNR in dB between uint8 images."""
    error = autoencoder.to_float(full) - autoencoder.to_float(tiny)
    return round(autoencoder.psnr(error.square().mean().item()), 2)


def compare(pipeline: DiffusionPipeline, tiny: AutoencoderTiny, prompts: list[str]) -> dict[str, float]:
    """Return the PSNR against the full decoder after each share of the steps, with one run per prompt."""
    steps = predictions.predicted_latents(pipeline, prompts, SEED)
    chosen = {share: steps[round(share * len(steps)) - 1] for share in SHARES}
    return {
        f"psnr_at_{share:.0%}": psnr(tiny_vae.decode(pipeline.vae, z), tiny_vae.decode(tiny, z))
        for share, z in chosen.items()
    }


@torch.no_grad()
def milliseconds(vaes: list[AutoencoderKL | AutoencoderTiny]) -> list[float]:
    """Return the CPU time of decoding one image on one thread: the minimum of many alternating runs."""
    z = torch.randn(1, autoencoder.LATENT_CHANNELS, 16, 16)
    best = [float("inf")] * len(vaes)
    for _ in range(ROUNDS):
        for number, vae in enumerate(vaes):
            started = time.thread_time()
            vae.decode(z)
            best[number] = min(best[number], (time.thread_time() - started) * 1000)
    return [round(value, 2) for value in best]


def sheet(pipeline: DiffusionPipeline, tiny: AutoencoderTiny, path: Path) -> None:
    """Draw predictions of a few names at every second step: full decoder (top) and tiny decoder (bottom)."""
    rows = []
    for number, prompt in enumerate(sheets.PREVIEWED):
        z = predictions.predicted_latents(pipeline, [prompt], SEED + number)[1::2, 0]
        for vae in (pipeline.vae, tiny):
            rows.append(torch.cat(list(tiny_vae.decode(vae, z)), dim=2))
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the exported pipeline")
    parser.add_argument("--tiny-vae", type=Path, required=True, help="folder of the tiny decoder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write the figures to")
    parser.add_argument("--sheet", type=Path, help="picture of both decoders' previews to write (PNG or WebP)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, _ = evaluate.load(options.model)
    tiny = AutoencoderTiny.from_pretrained(options.tiny_vae, torch_dtype=torch.float32)
    names, _ = reference.names_and_pictures()
    full_ms, tiny_ms = milliseconds([pipeline.vae, tiny])
    figures = {
        "names": compare(pipeline, tiny, [name.lower() for name in random.Random(SEED).sample(names, NAMES)]),
        "prompts": compare(pipeline, tiny, list(sheets.PROMPTS)),
        "full_milliseconds": full_ms,
        "tiny_milliseconds": tiny_ms,
        "times_faster": round(full_ms / tiny_ms, 1),
        "decoder_parameters": sum(parameter.numel() for parameter in tiny.decoder.parameters()),
        "kilobytes": round(sum(path.stat().st_size for path in options.tiny_vae.iterdir()) / 1000),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.sheet:
        sheet(pipeline, tiny, options.sheet)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
