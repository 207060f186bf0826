"""Measures how long a final image takes as a file, and whether other Python threads run meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import io
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from benchmarks.runs import bundled, watched
from calotype_server.engine.generation_run import to_pixels
from calotype_server.images.encoder import encode_final
from calotype_server.types import OutputOptions, Pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    results["python_beside_png"] = statistics.median(shares)
    return results | steps_beside(rounds, pipeline, pixels[0])


@torch.no_grad()
def steps_beside(rounds: int, pipeline: Any, pixels: Pixels) -> dict[str, float]:
    """Returns the time of a denoiser call while another thread finishes images, over its time alone.

    Both use one CPU thread. The figures count only on a machine with two idle cores.
    """
    unet, size = pipeline.unet.config, pipeline.unet.config.sample_size
    latents = torch.randn(1, unet.in_channels, size, size)
    prompt = torch.randn(1, pipeline.tokenizer.model_max_length, unet.cross_attention_dim)
    work = {
        "nothing": lambda: time.sleep(0.01),
        "decode": lambda: pipeline.vae.decode(latents),
        "png": lambda: png(pixels),
        "pillow": lambda: pillow(pixels),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            with repeated(function):
                started = time.perf_counter()
                for _ in range(8):
                    pipeline.unet(latents, 500, prompt)
                times[name].append(time.perf_counter() - started)
    return {
        f"step_beside_{name}": statistics.median(a / b for a, b in zip(each, times["nothing"], strict=True))
        for name, each in times.items()
        if name != "nothing"
    }


@contextlib.contextmanager
def repeated(function: Callable[[], object]) -> Iterator[None]:
    """Calls `function` again and again in another thread."""
    stopping = threading.Event()

    def work() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            while not stopping.is_set():
                function()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


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
    count = 0

    def work() -> None:
        nonlocal count
        for _ in range(1000):
            count += 1

    with repeated(work):
        before, started = count, time.perf_counter()
        for _ in range(10):
            function(*arguments)
        return (count - before) / (time.perf_counter() - started)
