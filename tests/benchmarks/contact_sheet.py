"""Draws the usual previews next to Calotype's, at every second step: `make contact-sheet`.

The upper row of each pair shows the noisy latents through the full VAE, the usual callback. The lower row shows the
predicted x0 through the preview head, as a server sends it after it has made some images.
"""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from benchmarks.previews import LESSONS, image
from benchmarks.runs import STEPS, bundled, watched
from calotype_server.engine.preview.calibrate import calibrate
from calotype_server.engine.preview.head import PreviewHead

PROMPTS = (("a red apple", 1), ("fox", 3))
TARGET = Path("service/contact_sheet.jpg")
CELL, GAP, LABEL = 128, 6, 26
BACKGROUND, INK = "white", "#444444"


def main() -> None:
    """Generates the images and draws the sheet."""
    pipeline, model = bundled()
    head = calibrate(pipeline, model)
    for seed, prompt in enumerate(LESSONS):
        steps, picture = watched(pipeline, prompt, seed)
        head = head.updated(PreviewHead.observe(head.scale, steps[STEPS].x0(), picture))
    shown = range(2, STEPS + 1, 2)
    width = len(shown) * (CELL + GAP) - GAP
    sheet = PIL.Image.new("RGB", (width, LABEL + len(PROMPTS) * (2 * (CELL + GAP) + GAP)), BACKGROUND)
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(14)
    for column, number in enumerate(shown):
        center = column * (CELL + GAP) + CELL // 2
        draw.text((center, LABEL // 2), f"step {number}", INK, font, anchor="mm")
    top = LABEL
    for prompt, seed in PROMPTS:
        steps, _ = watched(pipeline, prompt, seed)
        for column, number in enumerate(shown):
            # The usual callback decodes the latents after step n, which are the input of step n + 1.
            noisy = steps[number + 1].sample if number < STEPS else steps[number].x0()
            left = column * (CELL + GAP)
            exact = pipeline.vae.decode(noisy / pipeline.vae.config.scaling_factor, return_dict=False)[0]
            sheet.paste(image((exact.detach() / 2 + 0.5).clamp(0, 1)), (left, top))
            sheet.paste(image(head.decode(steps[number].x0(), model.width, model.height)), (left, top + CELL + GAP))
        top += 2 * (CELL + GAP) + GAP
    sheet.save(TARGET, quality=88)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
