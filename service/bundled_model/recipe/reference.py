"""Small reference images, stored with the recipe so that a model can be evaluated without the data set.

`names.webp` holds every image of the vocabulary at 32 px, in order; `whole.webp` holds some at their full 128 px. Both
are lossless.
"""

import argparse
from pathlib import Path

import data
import numpy as np
from PIL import Image

FOLDER = Path(__file__).with_name("reference")
COLUMNS = 32
SMALL = 32  # pixels
WHOLE = 48  # full-size images, evenly spread over the vocabulary


def shrink(picture: Image.Image) -> np.ndarray:
    """Return an image at the small size used for comparisons (each pixel is the mean of its area)."""
    return np.asarray(picture.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX))


def write_atlas(path: Path, pictures: np.ndarray) -> None:
    """Arrange images (N x size x size x 3) in rows of `COLUMNS` on white."""
    count, size = pictures.shape[:2]
    rows = -(-count // COLUMNS)
    atlas = np.full((rows * size, COLUMNS * size, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = (index // COLUMNS) * size, (index % COLUMNS) * size
        atlas[top : top + size, left : left + size] = picture
    Image.fromarray(atlas).save(path, lossless=True, quality=100, method=6)


def read_atlas(path: Path, count: int, size: int) -> np.ndarray:
    """Return the first `count` images of an atlas."""
    with Image.open(path) as file:
        atlas = np.asarray(file.convert("RGB"))
    cells = atlas.reshape(-1, size, COLUMNS, size, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(-1, size, size, 3)[:count]


def names_and_pictures() -> tuple[list[str], np.ndarray]:
    """Return the names of the vocabulary and their 32-px images."""
    names = [name for _, name in data.read_vocabulary()]
    return names, read_atlas(FOLDER / "names.webp", len(names), SMALL)


def whole_pictures() -> np.ndarray:
    """Return the full-size images."""
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
