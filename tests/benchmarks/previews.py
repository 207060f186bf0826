"""Measures the cost of each preview method, and how close it is to the full VAE."""

from __future__ import annotations

import io
import math
import statistics
import time
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from benchmarks.runs import STEPS, bundled, tiny_vae, watched
from calotype_server.engine.preview.calibrate import calibrate
from calotype_server.engine.preview.decoders import Decoder, HeadDecoder, VaeDecoder
from calotype_server.engine.preview.head import PreviewHead
from calotype_server.images.encoder import encode_preview
from calotype_server.types import Pixels, PreviewOptions

if TYPE_CHECKING:
    import calotype

LESSONS = (
    "waving hand", "pickup truck", "Christmas tree", "crying face", "broken heart", "ferris wheel", "farmer", "peanuts",
    "banana", "kiwi fruit", "alien", "cookie", "victory hand", "red circle", "umbrella", "strawberry",
)  # fmt: skip
"""Prompts that the head learns from. The measurements use none of them."""

EXAM = (
    "tooth", "socks", "purple square", "ladder", "tornado", "pear", "eyes", "printer", "lipstick", "goblin",
    "briefcase", "chocolate bar",
)  # fmt: skip

REPEATS = 20


def measure() -> dict[str, float]:
    """Returns milliseconds, bytes of a default preview, and PSNR at 25, 50 and 75 % of the steps, for each method."""
    pipeline, model = bundled()
    full = VaeDecoder(pipeline, pipeline.vae)
    calibrated = calibrate(pipeline, model)
    updated = calibrated
    for seed, prompt in enumerate(LESSONS):
        steps, picture = watched(pipeline, prompt, seed)
        updated = updated.updated(PreviewHead.observe(updated.scale, steps[STEPS].x0(), picture))
    decoders: dict[str, Decoder] = {
        "head": HeadDecoder(updated),
        "head_untaught": HeadDecoder(calibrated),
        "full_vae": full,
    }
    tiny = tiny_vae(pipeline)
    if tiny is not None:
        decoders["tiny_vae"] = VaeDecoder(pipeline, tiny)
    runs = [watched(pipeline, prompt, seed)[0] for seed, prompt in enumerate(EXAM)]
    size = (model.width, model.height)
    torch.set_num_threads(1)  # same as on the preview thread
    results = {}
    for name, decoder in decoders.items():
        sizes = []
        for share in (25, 50, 75):
            latents = [steps[STEPS * share // 100].x0() for steps in runs]
            pairs = [(decoder.decode(x0, *size), full.decode(x0, *size)) for x0 in latents]
            if decoder is not full:
                results[f"{name}_psnr_{share}"] = statistics.mean(psnr(ours, exact) for ours, exact in pairs)
            sizes += [len(default_jpeg(ours)) for ours, _ in pairs]
        results[f"{name}_bytes"] = statistics.mean(sizes)
        results[f"{name}_ms"] = 1000 * seconds(decoder, latents[0], size)
        if decoder is not full:
            results[f"{name}_r2"] = explained([ours for ours, _ in pairs], [exact for _, exact in pairs])
    return results


def stream_bytes(client: calotype.Client) -> dict[str, float]:
    """Returns the bytes of a default stream's previews over those of full-size JPEGs of quality 95 at every step."""
    streamed, large = 0, 0
    for seed, prompt in enumerate(EXAM[:4]):
        for progress in client.generate(prompt, seed=seed, steps=STEPS):
            if progress.preview is not None:
                streamed += len(progress.preview.data)
    pipeline, model = bundled()
    full = VaeDecoder(pipeline, pipeline.vae)
    for seed, prompt in enumerate(EXAM[:4]):
        for step in watched(pipeline, prompt, seed)[0].values():
            file = io.BytesIO()
            image(full.decode(step.x0(), model.width, model.height)).save(file, "jpeg", quality=95)
            large += len(file.getvalue())
    return {"stream_bytes_over_full_q95": streamed / large}


def image(picture: torch.Tensor) -> PIL.Image.Image:
    """Returns a Pillow image from a tensor of shape (1, 3, height, width) with values from 0 to 1."""
    return PIL.Image.fromarray((picture[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def default_jpeg(picture: torch.Tensor) -> bytes:
    """Returns the image file that the server would send."""
    pixels = image(picture)
    options = PreviewOptions()
    return encode_preview(Pixels(*pixels.size, pixels.tobytes()), options.max_edge, options.quality).data


def psnr(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB of images from 0 to 1. Scales a smaller image up, like a viewer."""
    if ours.shape != exact.shape:
        ours = torch.nn.functional.interpolate(ours, size=exact.shape[-2:], mode="bicubic").clamp(0, 1)
    return -10 * math.log10(float(((ours - exact) ** 2).mean()))


def explained(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Returns the share of the variance of the exact images that our images explain (R squared)."""
    guess, truth = torch.cat(ours), torch.cat(exact)
    return float(1 - ((guess - truth) ** 2).mean() / truth.var())


def seconds(decoder: Decoder, latents: Any, size: tuple[int, int]) -> float:
    """Returns the processor seconds of one decode: the minimum of several, because disturbances only add time."""
    times = []
    for _ in range(REPEATS):
        started = time.thread_time()
        decoder.decode(latents, *size)
        times.append(time.thread_time() - started)
    return min(times)
