"""Measures how long a final image takes as a file, and whether other Python threads run meanwhile."""

from __future__ import annotations

import hashlib
import io
import statistics
import threading
import time
from typing import TYPE_CHECKING

import PIL.Image
import torch

from benchmarks.runs import bundled, watched
from calotype_server.engine.generation_run import to_pixels
from calotype_server.images.encoder import encode_final
from calotype_server.types import OutputOptions, Pixels

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPTS = ("tooth", "ladder", "tornado", "pear")
SIZE = 1024
NOISE = 2 / 255
"""Standard deviation of the noise in photographs and in images of large models; enlarged images have none."""


def measure(rounds: int) -> dict[str, float]:
    """Returns CPU time and bytes of PNG files relative to Pillow's compression level 3, and CPU time of all formats.

    Args:
        rounds: Number of measurements; the median counts.
    """
    pipeline, _ = bundled()
    torch.set_num_threads(1)
    pictures = [watched(pipeline, prompt, seed)[1] for seed, prompt in enumerate(PROMPTS)]
    large = torch.nn.functional.interpolate(torch.cat(pictures), (SIZE, SIZE), mode="bicubic")
    large += NOISE * torch.randn(large.shape, generator=torch.Generator().manual_seed(0))
    small_pixels = [to_pixels(picture) for picture in pictures]
    pixels = [to_pixels(picture[None]) for picture in large]
    results = {
        "png_bytes_over_pillow": size(png, pixels) / size(pillow, pixels),
        "png_bytes_over_pillow_128px": size(png, small_pixels) / size(pillow, small_pixels),
    }
    times: dict[str, list[float]] = {name: [] for name in ("pillow", "png", "jpeg", "webp", "conversion")}
    for number in range(rounds):
        picture, image = large[number % len(large)][None], pixels[number % len(pixels)]
        times["conversion"].append(cpu_seconds(to_pixels, picture))
        times["pillow"].append(cpu_seconds(pillow, image))
        times["png"].append(cpu_seconds(png, image))
        times["jpeg"].append(cpu_seconds(encode_final, image, OutputOptions("jpeg"), ""))
        times["webp"].append(cpu_seconds(encode_final, image, OutputOptions("webp"), ""))
    results["png_over_pillow"] = statistics.median(a / b for a, b in zip(times["png"], times["pillow"], strict=True))
    results |= {f"final_{name}_ms": 1000 * statistics.median(each) for name, each in times.items()}
    shares = [python_beside(png, pixels[0]) / python_beside(without_lock, pixels[0]) for _ in range(rounds)]
    return results | {"python_beside_png": statistics.median(shares)}


def png(pixels: Pixels) -> bytes:
    """Returns the server's PNG file."""
    return encode_final(pixels, OutputOptions("png"), "").data


def pillow(pixels: Pixels) -> bytes:
    """Returns Pillow's PNG file of level 3: half the time of its default, for a few per cent more bytes."""
    file = io.BytesIO()
    image = PIL.Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data)
    image.save(file, "png", compress_level=3)
    return file.getvalue()


def size(encode: Callable[[Pixels], bytes], images: list[Pixels]) -> int:
    """Returns the number of bytes of all files."""
    return sum(len(encode(image)) for image in images)


def without_lock(pixels: Pixels) -> None:
    """Uses a core for several milliseconds and holds the interpreter lock for none of them."""
    hashlib.sha256(pixels.data).digest()


def cpu_seconds(function: Callable[..., object], *arguments: object) -> float:
    """Returns the CPU time of this thread."""
    started = time.thread_time()
    function(*arguments)
    return time.thread_time() - started


def python_beside(function: Callable[..., object], *arguments: object) -> float:
    """Returns the loops per second of another Python thread while this thread calls `function` ten times."""
    count, stopping = 0, threading.Event()

    def work() -> None:
        nonlocal count
        while not stopping.is_set():
            count += 1

    thread = threading.Thread(target=work)
    thread.start()
    before, started = count, time.perf_counter()
    for _ in range(10):
        function(*arguments)
    rate = (count - before) / (time.perf_counter() - started)
    stopping.set()
    thread.join()
    return rate
