"""An image file from the server. Only the methods that decode or convert it need Pillow."""

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
"""Maps file suffixes to formats. The first suffix of a format is its default."""

_EXIF_IFD, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"


@dataclass(frozen=True, slots=True)
class Image:
    """A complete image file in memory: a preview or a final image. Notebooks display it.

    Usage::

        image.save("apple.png")
        image.to_pil().show()

    Attributes:
        data: The content of the file, as the server sent it.
        format: "jpeg" for previews; "png", "jpeg" or "webp" for final images; "unknown" for a format that this version
            of the client does not know.
        width: Width in pixels.
        height: Height in pixels.
    """

    data: bytes
    format: str
    width: int
    height: int

    @property
    def suffix(self) -> str:
        """The default file suffix: ".jpg", ".png" or ".webp". Empty when the format is unknown."""
        return next((suffix for suffix, kind in FORMATS.items() if kind == self.format), "")

    def to_pil(self) -> PIL.Image.Image:
        """Decodes the file to a `PIL.Image.Image`.

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
        """Reads the generation parameters (prompt, seed, size, ...) that the server wrote into the file.

        They are in the fields that other tools use: the text chunk `parameters` of a PNG, the EXIF field UserComment of
        a JPEG or WebP.

        Returns:
            The parameters as text, or None when the file has none (see `Output.metadata`).

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

        If the suffix matches the format, or there is no suffix, the data is written unchanged. Otherwise Pillow
        converts it, and the parameters in the file are lost.

        Args:
            path: The file. An existing file is replaced.

        Raises:
            ImportError: The image must be converted and Pillow is not installed.
            ValueError: Pillow knows no image format with this suffix.
            OSError: The file cannot be written.
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

    # IPython has separate methods for PNG and JPEG, but none for WebP; this one covers all formats.
    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {f"image/{self.format}": base64.b64encode(self.data).decode()} if self.suffix else {}
