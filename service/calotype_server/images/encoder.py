"""Encodes pixels as image files, on its own threads: never in the event loop or in the thread of a generation."""

from __future__ import annotations

import asyncio
import io
import time
from typing import TYPE_CHECKING, Any, Literal

import structlog
from PIL import ExifTags, Image

from calotype_server import errors, threads
from calotype_server.failpoints import hit
from calotype_server.images.png import encode_png
from calotype_server.images.scaling import scaled, scaled_preview
from calotype_server.observability.events import ImageEncoded, Observe, ignore
from calotype_server.types import EncodedImage, OutputOptions, Pixels, PreviewOptions

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Encoder", "encode_final", "encode_preview"]

_log = structlog.get_logger(__name__)

_THREADS = 3

_FINAL_THREADS = 2
"""Final images at once. The other thread is free for previews, which readers wait for at every step."""

_PREVIEW_SECONDS = 5.0
"""Longest duration of encoding a preview: readers wait for it, and a newer one replaces it."""

_MAX_COMMENT_BYTES = 60_000
"""An EXIF block can contain at most 64 KiB, including its other fields."""


class Encoder:
    """Encodes previews as JPEG and final images in the requested format. Lives in the event loop.

    Previews never wait for final images, however many generations end at once. A call that takes too long fails, and
    its thread is replaced.

    Args:
        on_preview: Called with the CPU seconds that encoding a preview took.
        observe: Receives an `ImageEncoded` for each file.
        seconds: Longest duration of a call; at most 5 s for a preview.
        on_exhausted: Called when so many threads hang that only a new process helps.
    """

    def __init__(
        self,
        on_preview: Callable[[float], None] | None = None,
        observe: Observe = ignore,
        *,
        seconds: float = 30.0,
        on_exhausted: Callable[[], None] | None = None,
    ) -> None:
        self._on_preview = on_preview
        self._observe = observe
        self._seconds = seconds
        self._on_exhausted = on_exhausted
        self._pool = threads.Pool("encode", _THREADS)
        self._finals = asyncio.Semaphore(_FINAL_THREADS)

    @property
    def problem(self) -> str | None:
        """Description of a hang for health checks and the log; None if no thread hangs. Never contains a prompt."""
        return f"encoder threads that hang: {self._pool.hung}" if self._pool.hung else None

    @property
    def hung(self) -> int:
        """Number of threads that hang."""
        return self._pool.hung

    async def preview(
        self, pixels: Pixels, options: PreviewOptions, size: tuple[int, int] | None = None
    ) -> EncodedImage:
        """Returns a JPEG whose longer edge is at most `options.max_edge` pixels.

        Args:
            pixels: The preview.
            options: Size and quality.
            size: Size of the final image, if it is not that which the model draws.

        Raises:
            GenerationFailed: It took too long.
        """
        seconds = min(self._seconds, _PREVIEW_SECONDS)
        return await self._run("preview", seconds, self._timed_preview, pixels, options, size)

    async def final(self, pixels: Pixels, options: OutputOptions, parameters: str) -> EncodedImage:
        """Returns the full-size image; its file contains `parameters` if `options.metadata`.

        Raises:
            GenerationFailed: It took too long.
        """
        async with self._finals:
            return await self._run("final", self._seconds, encode_final, pixels, options, parameters)

    def close(self) -> None:
        """Waits for running encodes to finish, except those that hang, and stops the threads."""
        self._pool.close()

    def _timed_preview(self, pixels: Pixels, options: PreviewOptions, size: tuple[int, int] | None) -> EncodedImage:
        start = time.thread_time()
        image = encode_preview(pixels, options.max_edge, options.quality, size)
        if self._on_preview is not None:
            self._on_preview(time.thread_time() - start)
        return image

    async def _run(
        self,
        kind: Literal["preview", "final"],
        seconds: float,
        function: Callable[..., EncodedImage],
        *arguments: object,
    ) -> EncodedImage:
        def encode() -> EncodedImage:
            hit(f"encoder.{kind}")
            start = time.perf_counter()
            image = function(*arguments)
            self._observe(ImageEncoded(kind, image.format, time.perf_counter() - start))
            return image

        try:
            return await self._pool.run(seconds, encode)
        except threads.ThreadsExhausted as error:
            raise errors.GenerationFailed("The server cannot encode images right now.") from error
        except threads.ThreadHangs as error:
            _log.error("encoding hangs", kind=kind, error=str(error), stacks=threads.stacks())
            if self._pool.is_exhausted and self._on_exhausted is not None:
                self._on_exhausted()
            raise errors.GenerationFailed("Encoding the image took too long.") from error


def encode_preview(pixels: Pixels, max_edge: int, quality: int, size: tuple[int, int] | None = None) -> EncodedImage:
    """Returns a JPEG of `pixels`, scaled down so that its longer edge is at most `max_edge` pixels.

    Args:
        pixels: The preview.
        max_edge: Longest edge of the file, in pixels.
        quality: Of the JPEG.
        size: Size of the final image, if it is not that which the model draws; the preview gets its aspect ratio.
    """
    image = _image(pixels)
    if size is not None:
        image = scaled_preview(image, size)
    image.thumbnail((max_edge, max_edge), Image.Resampling.BOX)
    return _save(image, "jpeg", quality=quality)


def encode_final(pixels: Pixels, options: OutputOptions, parameters: str) -> EncodedImage:
    """Returns the file of a final image, scaled to `options.size` if that is given.

    The parameters are where other tools look for them: in a text chunk named `parameters` in PNG, in the EXIF field
    UserComment in JPEG and WebP.
    """
    if options.size is not None:
        image = scaled(_image(pixels), options.size)
        pixels = Pixels(image.width, image.height, image.tobytes())
    if options.format == "png":
        data = encode_png(pixels, {"parameters": parameters} if options.metadata else {})
        return EncodedImage("png", pixels.width, pixels.height, data)
    saved: dict[str, Any] = {"quality": options.quality}
    if options.metadata:
        saved["exif"] = _exif(parameters)
    if options.format == "jpeg":
        # Full colour resolution. Previews use the default, half of it.
        saved["subsampling"] = "4:4:4"
    return _save(_image(pixels), options.format, **saved)


def _exif(text: str) -> Image.Exif:
    exif = Image.Exif()
    # The first eight bytes of a comment name its encoding (EXIF 2.3, table 9).
    encoded = text.encode("utf-16-be", "replace")
    if len(encoded) > _MAX_COMMENT_BYTES:
        # The cut may have split a character of four bytes.
        encoded = encoded[:_MAX_COMMENT_BYTES].decode("utf-16-be", "ignore").encode("utf-16-be")
    comment = b"UNICODE\0" + encoded
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif


def _image(pixels: Pixels) -> Image.Image:
    return Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data)


def _save(image: Image.Image, format: str, **options: Any) -> EncodedImage:  # noqa: A002 - the name in Pillow
    file = io.BytesIO()
    image.save(file, format, **options)
    return EncodedImage(format, image.width, image.height, file.getvalue())  # type: ignore[arg-type]
