"""Contact sheets: prompts that are not the name of an emoji, and the model's predictions during denoising."""

import argparse
from pathlib import Path

import data
import evaluate
import predictions
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

CAPTION = 16  # height of the line below an image in pixels
PROMPTS = (
    "a cold drink",
    "angry cat",
    "something to cut paper with",
    "crimson fruit",
    "a happy puppy",
    "a fast red car",
    "sad person crying",
    "a sweet dessert",
    "spicy food",
    "music with strings",
    "an animal in the sea",
    "it is raining",
)
PREVIEWED = ("red apple", "police car", "tiger face", "birthday cake", "guitar", "rocket")


def write_sheet(pictures: list[Image.Image], captions: list[str], columns: int, path: Path) -> None:
    """Write images in rows, each with its caption below."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * data.SIZE, rows * (data.SIZE + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * data.SIZE, index // columns * (data.SIZE + CAPTION)
        sheet.paste(picture, (left, top))
        pen.text((left + 3, top + data.SIZE + 1), caption, fill="black", font_size=10)
    sheet.save(path)


def prompts(pipeline: DiffusionPipeline, path: Path, seeds: int = 2) -> None:
    """Draw every prompt, one row for each seed."""
    pictures = [evaluate.generate(pipeline, prompt, seed) for seed in range(seeds) for prompt in PROMPTS]
    write_sheet(pictures, list(PROMPTS) * seeds, len(PROMPTS), path)


@torch.no_grad()
def decoded_predictions(pipeline: DiffusionPipeline, prompt: str, seed: int) -> list[Image.Image]:
    """Return the decoded prediction of the final image at every second step, including the last one."""
    latents = predictions.predicted_latents(pipeline, [prompt], seed)[1::2, 0] / pipeline.vae.config.scaling_factor
    return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)


def previews(pipeline: DiffusionPipeline, path: Path) -> None:
    """Draw a row of predictions for each of a few names."""
    rows = [decoded_predictions(pipeline, prompt, seed=1) for prompt in PREVIEWED]
    captions = [
        f"{prompt}, step {2 * (number + 1)}"
        for prompt, row in zip(PREVIEWED, rows, strict=True)
        for number in range(len(row))
    ]
    write_sheet([picture for row in rows for picture in row], captions, len(rows[0]), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sheet", choices=["prompts", "previews"])
    parser.add_argument("--model", type=Path, required=True, help="folder of the exported pipeline")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (PNG or WebP)")
    options = parser.parse_args()
    pipeline, _ = evaluate.load(options.model)
    {"prompts": prompts, "previews": previews}[options.sheet](pipeline, options.output)


if __name__ == "__main__":
    main()
