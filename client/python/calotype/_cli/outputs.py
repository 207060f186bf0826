"""The files that `calotype generate` writes."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image

from .filmstrip import compose, pick_evenly

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .._image import Image
    from .._types import Progress

__all__ = ["BadPath", "Outputs", "numbered"]


class BadPath(ValueError):
    """A file cannot be written to this path. Raised before the generation starts."""


class Outputs:
    """Writes the final image, the previews and the filmstrip.

    Args:
        output: File for the image. None names it calotype-SEED, with the suffix of its format.
        previews: Folder for the previews. None saves no previews.
        filmstrip: File for the filmstrip, a PNG. None writes no filmstrip.

    Raises:
        BadPath: A file cannot be written.
    """

    def __init__(self, output: Path | None, previews: Path | None, filmstrip: Path | None) -> None:
        self._output, self._previews, self._filmstrip = output, previews, filmstrip
        self._frames: list[Image] = []
        self._kept: set[Path] = set()
        PIL.Image.init()
        if output is not None:
            _check(output, {"", *(suffix for suffix, kind in PIL.Image.EXTENSION.items() if kind in PIL.Image.SAVE)})
        if filmstrip is not None:
            _check(filmstrip, {".png"})
        if previews is not None:
            try:
                previews.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadPath(f"Cannot create the folder {previews}: {error.strerror}") from None

    def keep(self, progress: Progress) -> Path | None:
        """Saves the preview of a progress, if it has one and there is a folder.

        Deletes all saved previews when previews are withdrawn.

        Returns:
            The file of the preview, or None.
        """
        if progress.previews_withdrawn:
            self._withdraw()
        if progress.preview is None:
            return None
        if self._filmstrip is not None:
            self._frames.append(progress.preview)
        if self._previews is None:
            return None
        digits = max(2, len(str(progress.total_steps)))
        path = self._previews / f"step-{progress.image_step:0{digits}}{progress.preview.suffix}"
        self._kept.add(path)
        path.write_bytes(progress.preview.data)
        return path

    def _withdraw(self) -> None:
        self._frames.clear()
        for path in self._kept:
            path.unlink(missing_ok=True)
        self._kept.clear()

    def finish(self, image: Image, seed: int) -> Path:
        """Writes the final image and the filmstrip. Returns the file of the image."""
        output = self._output or _unused(f"calotype-{seed}", image.suffix)
        with _replacing(output) as path:
            image.save(path)
        if self._previews is not None:
            image.save(self._previews / f"final{image.suffix}")
        if self._filmstrip is not None:
            with _replacing(self._filmstrip) as path:
                compose([*pick_evenly(self._frames), image]).save(path)
        return output


def numbered(output: Path | None, previews: Path | None, filmstrip: Path | None, number: int) -> Outputs:
    """Returns the files of one of several generations: apple.png becomes apple-2.png, and previews get a subfolder.

    Args:
        output: As for `Outputs`.
        previews: As for `Outputs`.
        filmstrip: As for `Outputs`.
        number: Of the generation, from 1.

    Raises:
        BadPath: A file cannot be written.
    """

    def add_number(path: Path | None) -> Path | None:
        return None if path is None else path.with_name(f"{path.stem}-{number}{path.suffix}")

    return Outputs(add_number(output), previews and previews / str(number), add_number(filmstrip))


def _check(path: Path, suffixes: set[str]) -> None:
    if path.is_dir():
        raise BadPath(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise BadPath(f"There is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadPath(f"No permission to write {path}")
    if path.suffix.lower() not in suffixes:
        likely = sorted(suffixes & {".png", ".jpg", ".webp"})
        raise BadPath(f"Cannot write {path.suffix or 'without a suffix'}: use {', '.join(likely)}")


def _unused(stem: str, suffix: str) -> Path:
    """Returns a path that does not exist. A default name never replaces a file: the same seed can have many prompts."""
    path, number = Path(stem + suffix), 2
    while path.exists():
        path, number = Path(f"{stem}-{number}{suffix}"), number + 1
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file, which replaces `path` when the block ends. `path` is never incomplete."""
    target = path.resolve()
    if target.exists() and not target.is_file():  # such as /dev/stdout
        yield target
        return
    temporary = target.with_name(f".calotype-{os.getpid()}-{target.name}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
