"""Measure an exported model: whether it draws the prompt, how accurate its autoencoder is, and how fast it is.

Needs torch, diffusers, numpy, Pillow and the images in `reference/`, but no data set.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import autoencoder
import numpy as np
import reference
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

NAMES = 200
STEPS = 20
GUIDANCE = 3.0
SEED = 20
CELL = 96  # edge of an image on the contact sheet in pixels
CAPTION = 12  # height of the line below it in pixels


@dataclass(frozen=True)
class Drawing:
    """One generated image. `rank` counts the names whose image is at least as near as its own (1: only its own)."""

    name: str
    picture: Image.Image
    rank: int
    seconds: float


def load(folder: Path) -> tuple[DiffusionPipeline, float]:
    """Return the pipeline and the seconds it took to load."""
    started = time.perf_counter()
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    seconds = time.perf_counter() - started
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, seconds


def generate(pipeline: DiffusionPipeline, prompt: str, seed: int, guidance: float = GUIDANCE) -> Image.Image:
    """Draw one prompt."""
    source = torch.Generator().manual_seed(seed)
    return pipeline(prompt, num_inference_steps=STEPS, guidance_scale=guidance, generator=source).images[0]


def rank(picture: Image.Image, own: int, pictures: np.ndarray) -> int:
    """Return the position of image number `own` when all images are sorted by mean squared distance at 32 px."""
    difference = pictures.astype(np.float32) - reference.shrink(picture).astype(np.float32)
    distances = np.square(difference).mean((1, 2, 3))
    return int((distances <= distances[own]).sum())


def draw_names(pipeline: DiffusionPipeline, count: int, guidance: float) -> list[Drawing]:
    """Draw `count` names of the vocabulary, chosen with a fixed seed, each with different noise."""
    names, pictures = reference.names_and_pictures()
    generate(pipeline, names[0], SEED, guidance)  # not timed, because the first run is slower
    drawings = []
    for number, own in enumerate(random.Random(SEED).sample(range(len(names)), count)):
        started = time.perf_counter()
        picture = generate(pipeline, names[own].lower(), SEED + number, guidance)
        seconds = time.perf_counter() - started
        drawings.append(Drawing(names[own], picture, rank(picture, own, pictures), seconds))
    return drawings


@torch.no_grad()
def reconstruction_psnr(pipeline: DiffusionPipeline) -> float:
    """Return the autoencoder's PSNR in dB over the full-size reference images, rounded to 8 bits."""
    x = torch.from_numpy(reference.whole_pictures()).permute(0, 3, 1, 2).float() / 127.5 - 1
    error = 0.0
    for picture in x.split(8):
        latents = pipeline.vae.encode(picture).latent_dist.mode()
        y = pipeline.vae.decode(latents).sample.clamp(-1, 1)
        error += (((y + 1) * 127.5).round() / 127.5 - 1 - picture).square().sum().item()
    return autoencoder.psnr(error / x.numel())


def contact_sheet(drawings: list[Drawing], path: Path, columns: int = 20) -> None:
    """Write all drawings with their names: black for the nearest image, orange for rank 2 to 5, red for the rest."""
    rows = -(-len(drawings) // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, drawing in enumerate(drawings):
        left, top = index % columns * CELL, index // columns * (CELL + CAPTION)
        sheet.paste(drawing.picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
        colour = "black" if drawing.rank == 1 else "darkorange" if drawing.rank <= 5 else "red"
        pen.text((left + 2, top + CELL), drawing.name[:17], fill=colour, font_size=9)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the exported pipeline")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write the figures to")
    parser.add_argument("--sheet", type=Path, help="contact sheet to write (PNG or WebP)")
    parser.add_argument("--names", type=int, default=NAMES, help="how many names to draw")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    options = parser.parse_args()
    pipeline, load_seconds = load(options.model)
    drawings = draw_names(pipeline, options.names, options.guidance)
    size = sum(path.stat().st_size for path in options.model.rglob("*") if path.is_file())
    figures = {
        "top1": sum(drawing.rank == 1 for drawing in drawings) / len(drawings),
        "top5": sum(drawing.rank <= 5 for drawing in drawings) / len(drawings),
        "psnr": round(reconstruction_psnr(pipeline), 2),
        "seconds_per_image": round(statistics.median(drawing.seconds for drawing in drawings), 3),
        "load_seconds": round(load_seconds, 3),
        "megabytes": round(size / 1e6, 1),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.sheet:
        contact_sheet(drawings, options.sheet)
    print(json.dumps(figures, indent=2))
    print("not the nearest:", ", ".join(f"{drawing.name} ({drawing.rank})" for drawing in drawings if drawing.rank > 1))


if __name__ == "__main__":
    main()
