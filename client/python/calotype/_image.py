"""A picture as it came from the server. Only `to_pil` and what builds on it need Pillow."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    import PIL.Image

    from ._options import FormatName

__all__ = ["FORMATS", "Image"]

FORMATS: dict[str, FormatName] = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
"""Formats by the suffix of a file name; the first of a format is the usual one."""

_EXIF_IFD, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"


@dataclass(frozen=True, slots=True)
class Image:
    """A complete image file in memory. Notebooks show it as a picture.

    Attributes:
        data: The file, as it came from the server.
        format: "jpeg" for previews; "png", "jpeg" or "webp" for final images. "unknown" for one that is newer than
            this client.
        width: Width in pixels.
        height: Height in pixels.
    """

    data: bytes
    format: str
    width: int
    height: int

    @property
    def suffix(self) -> str:
        """The usual suffix of file names: ".jpg", ".png" or ".webp". Empty when the format is unknown."""
        return next((suffix for suffix, kind in FORMATS.items() if kind == self.format), "")

    def to_pil(self) -> PIL.Image.Image:
        """Decodes to a `PIL.Image.Image`.

        Raises:
            ImportError: Pillow is not installed.
        """
        try:
            import PIL.Image
        except ImportError:
            raise ImportError("Decoding an image needs Pillow: pip install pillow") from None
        picture = PIL.Image.open(io.BytesIO(self.data))
        picture.load()
        return picture

    def parameters(self) -> str | None:
        """Reads the parameters (prompt, seed, size, ...) that the server wrote into the file, or None without any.

        They are where other tools look for them: a text named `parameters` in PNG, the EXIF field UserComment in JPEG
        and WebP.

        Raises:
            ImportError: Pillow is not installed.
        """
        picture = self.to_pil()
        if self.format == "png":
            text = picture.info.get("parameters")
            return text if isinstance(text, str) else None
        comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
        if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
            return None
        return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the image to a file.

        The bytes are written as they are when the suffix fits the format or there is none; otherwise Pillow converts,
        and the parameters in the file are lost.

        Args:
            path: Where to write. An existing file is replaced.

        Raises:
            ImportError: A conversion is needed and Pillow is not installed.
            ValueError: The suffix is not one of an image format that Pillow knows.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if not suffix or FORMATS.get(suffix) == self.format:
            path.write_bytes(self.data)
            return
        try:
            picture = self.to_pil()
        except ImportError:
            raise ImportError(
                f"Saving a {self.format} image as {suffix} needs Pillow: pip install pillow, or save with the suffix "
                f"{self.suffix!r}"
            ) from None
        picture.save(path)

    def __repr__(self) -> str:
        return f"<Image {self.format} {self.width}x{self.height}, {len(self.data)} bytes>"

    # One hook for all formats: IPython has none of its own for WebP.
    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {f"image/{self.format}": base64.b64encode(self.data).decode()} if self.suffix else {}
