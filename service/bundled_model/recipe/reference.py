"""The small pictures kept beside the recipe, so that a model can be evaluated without fetching the data set.

`names.webp` holds every image of the vocabulary at 32 px, in its order; `whole.webp` some at their full 128 px.
Both are lossless.
"""

import argparse
from pathlib import Path

import data
import numpy as np
from PIL import Image

FOLDER = Path(__file__).with_name("reference")
COLUMNS = 32
SMALL = 32  # pixels
WHOLE = 48  # whole images, evenly spread over the vocabulary


def shrink(picture: Image.Image) -> np.ndarray:
    """Return a picture at the small size in which pictures are compared (every pixel the mean of its area)."""
    return np.asarray(picture.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX))


def write_atlas(path: Path, pictures: np.ndarray) -> None:
    """Lay pictures (N x size x size x 3) out in rows of `COLUMNS` on white."""
    count, size = pictures.shape[:2]
    rows = -(-count // COLUMNS)
    atlas = np.full((rows * size, COLUMNS * size, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = (index // COLUMNS) * size, (index % COLUMNS) * size
        atlas[top : top + size, left : left + size] = picture
    Image.fromarray(atlas).save(path, lossless=True, quality=100, method=6)


def read_atlas(path: Path, count: int, size: int) -> np.ndarray:
    """Return the first `count` pictures of an atlas."""
    with Image.open(path) as file:
        atlas = np.asarray(file.convert("RGB"))
    cells = atlas.reshape(-1, size, COLUMNS, size, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(-1, size, size, 3)[:count]


def names_and_pictures() -> tuple[list[str], np.ndarray]:
    """Return the vocabulary's names and their 32-px pictures."""
    names = [name for _, name in data.read_vocabulary()]
    return names, read_atlas(FOLDER / "names.webp", len(names), SMALL)


def whole_pictures() -> np.ndarray:
    """Return the pictures kept at full size."""
    return read_atlas(FOLDER / "whole.webp", WHOLE, data.SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    images = data.load(options.work).images
    FOLDER.mkdir(exist_ok=True)
    write_atlas(FOLDER / "names.webp", np.stack([shrink(Image.fromarray(image)) for image in images]))
    write_atlas(FOLDER / "whole.webp", images[:: len(images) // WHOLE][:WHOLE])


if __name__ == "__main__":
    main()
