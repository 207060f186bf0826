"""Pixels to image files, on threads of its own: never in the event loop, never in a generation's thread."""

from __future__ import annotations

import asyncio
import contextvars
import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from PIL import ExifTags, Image, PngImagePlugin

from calotype_server.observability.events import ImageEncoded, Observe, ignore
from calotype_server.types import EncodedImage, OutputOptions, Pixels, PreviewOptions

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Encoder", "encode_final", "encode_preview"]

_MAX_COMMENT_BYTES = 60_000
"""An EXIF block holds 64 KiB in all."""


class Encoder:
    """Encodes previews as JPEG and final images in the format asked for.

    Args:
        on_preview: Told the seconds of processor time that encoding a preview took.
        observe: Told of each file.
    """

    def __init__(self, on_preview: Callable[[float], None] | None = None, observe: Observe = ignore) -> None:
        self._on_preview = on_preview
        self._observe = observe
        # Two, so that a preview does not wait behind another generation's final image.
        self._threads = ThreadPoolExecutor(2, "calotype-encode")

    async def preview(self, pixels: Pixels, options: PreviewOptions) -> EncodedImage:
        """Returns a JPEG no larger than `options.max_edge`."""
        return await self._run("preview", self._timed_preview, pixels, options.max_edge, options.quality)

    async def final(self, pixels: Pixels, options: OutputOptions, parameters: str) -> EncodedImage:
        """Returns a file of the full size, with `parameters` inside where the options want metadata."""
        return await self._run("final", encode_final, pixels, options, parameters)

    def close(self) -> None:
        """Ends the threads after what they are doing."""
        self._threads.shutdown()

    def _timed_preview(self, pixels: Pixels, max_edge: int, quality: int) -> EncodedImage:
        begun = time.thread_time()
        image = encode_preview(pixels, max_edge, quality)
        if self._on_preview is not None:
            self._on_preview(time.thread_time() - begun)
        return image

    async def _run(
        self, kind: Literal["preview", "final"], function: Callable[..., EncodedImage], *arguments: object
    ) -> EncodedImage:
        def encode() -> EncodedImage:
            begun = time.perf_counter()
            image = function(*arguments)
            self._observe(ImageEncoded(kind, image.format, time.perf_counter() - begun))
            return image

        # In the caller's context, so that lines logged on the way carry its ids.
        return await asyncio.get_running_loop().run_in_executor(self._threads, contextvars.copy_context().run, encode)


def encode_preview(pixels: Pixels, max_edge: int, quality: int) -> EncodedImage:
    """JPEG of `pixels`, its longer edge reduced to `max_edge` where it is larger."""
    image = _image(pixels)
    image.thumbnail((max_edge, max_edge), Image.Resampling.BOX)
    return _save(image, "jpeg", quality=quality)


def encode_final(pixels: Pixels, options: OutputOptions, parameters: str) -> EncodedImage:
    """The finished file. PNG takes compression level 3: half the time of the default for a few per cent more bytes.

    The parameters go where tools look for them: a text chunk named `parameters` in PNG, the EXIF field UserComment in
    JPEG and WebP.
    """
    saved: dict[str, Any] = {"compress_level": 3} if options.format == "png" else {"quality": options.quality}
    if options.metadata and options.format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("parameters", parameters)
        saved["pnginfo"] = text
    elif options.metadata:
        saved["exif"] = _exif(parameters)
    if options.format == "jpeg":
        # Colour at half resolution is for previews; the keeper gets all of it.
        saved["subsampling"] = "4:4:4"
    return _save(_image(pixels), options.format, **saved)


def _exif(text: str) -> Image.Exif:
    exif = Image.Exif()
    # A comment begins with eight bytes that name its encoding (EXIF 2.3, table 9).
    encoded = text.encode("utf-16-be", "replace")
    if len(encoded) > _MAX_COMMENT_BYTES:
        # A character of four bytes may have been cut in half.
        encoded = encoded[:_MAX_COMMENT_BYTES].decode("utf-16-be", "ignore").encode("utf-16-be")
    comment = b"UNICODE\0" + encoded
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif


def _image(pixels: Pixels) -> Image.Image:
    return Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data)


def _save(image: Image.Image, format: str, **options: Any) -> EncodedImage:  # noqa: A002 - Pillow's word
    file = io.BytesIO()
    image.save(file, format, **options)
    return EncodedImage(format, image.width, image.height, file.getvalue())  # type: ignore[arg-type]
