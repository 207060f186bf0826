"""Measures the denoiser and the VAE directly, on the device."""

from __future__ import annotations

import functools
import io
import itertools
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.side_stream import compare_priorities
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.preview.calibrate import calibrate
from calotype_server.engine.preview.decoders import HeadDecoder, VaeDecoder
from calotype_server.engine.requests.sample_calls import denoiser_call, sample_calls
from calotype_server.engine.runtime.collate import Collator
from calotype_server.engine.runtime.compare import tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    import PIL.Image

    from calotype_server.engine.preview.decoders import Decoder
    from calotype_server.types import ModelInfo

__all__ = ["decoded", "denoiser", "jpeg", "largest", "largest_input", "launch", "priorities", "rows"]

_CYCLES_PER_SECOND = 2e9
"""About the clock of current devices. It only decides how long the device sleeps."""


def denoiser(pipeline: Any) -> torch.nn.Module:
    """Returns the pipeline's denoiser."""
    return getattr(pipeline, denoiser_name(pipeline))


def launch(pipeline: Any, model: ModelInfo, device: torch.device, repeats: int) -> dict[str, float]:
    """Compares the time in which Python launches one denoiser call with the time in which the device computes it.

    Returns milliseconds, medians of `repeats` measurements. On a CPU all three are the same call.

    - `launch_ms`: from the start of the call to its return, with an idle device.
    - `call_ms`: from the start of the call until the device is done.
    - `device_ms`: on the device, between two events, while it has a queue of launches: it sleeps first, so that it does
      not wait for Python. The queue is limited (about a thousand launches), so this is an upper bound for large models.
    """
    call = denoiser_call(pipeline, model)
    for _ in range(2):
        call()
    found = [_launch_once(call, device) for _ in range(repeats)]
    return {name: 1000 * statistics.median(each[name] for each in found) for name in found[0]}


def _launch_once(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    _synchronize(device)
    started = time.perf_counter()
    call()
    launched = time.perf_counter() - started
    _synchronize(device)
    whole = time.perf_counter() - started
    if device.type != "cuda":
        return {"launch_ms": launched, "call_ms": whole, "device_ms": whole}
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(1.5 * launched * _CYCLES_PER_SECOND))
        start.record()
        call()
        end.record()
        end.synchronize()
    return {"launch_ms": launched, "call_ms": whole, "device_ms": start.elapsed_time(end) / 1000}


@torch.no_grad()
def rows(pipeline: Any, model: ModelInfo, device: torch.device, requests: int) -> dict[int, float]:
    """Returns the milliseconds of a joined call by its rows, for 1, 2, 4, ... requests; fewer if memory runs out."""
    module = denoiser(pipeline)
    collator = Collator(module)
    args, kwargs = sample_calls(pipeline, model)[0]
    bound = collator.bind(args, kwargs, {})
    found: dict[int, float] = {}
    for count in itertools.takewhile(lambda each: each <= requests, (2**power for power in itertools.count())):
        try:
            joined_args, joined = collator.join([bound] * count, bound.rows * count)
            times = []
            for _ in range(4):
                _synchronize(device)
                started = time.perf_counter()
                module(*joined_args, **joined)
                _synchronize(device)
                times.append(time.perf_counter() - started)
        except torch.OutOfMemoryError:
            break
        found[bound.rows * count] = 1000 * min(times[1:])
    return found


def priorities(pipeline: Any, model: ModelInfo, device: torch.device, steps: int, rounds: int) -> dict[str, float]:
    """Returns `compare_priorities` for an eager denoiser with previews by the head, and by the full VAE.

    Args:
        pipeline: The pipeline.
        model: Its description; all calls are those of its default request.
        device: The pipeline's device.
        steps: Steps in a run.
        rounds: Runs of each way.
    """
    call, full = denoiser_call(pipeline, model), VaeDecoder(pipeline, pipeline.vae)
    # Each step gets its own copy: the preview thread reads it while the denoiser continues.
    latents = torch.randn(full.shape(model.width, model.height)).to(device, next(denoiser(pipeline).parameters()).dtype)

    def step() -> torch.Tensor:
        call()
        return latents.clone()

    decoders: dict[str, Decoder] = {"head": HeadDecoder(calibrate(pipeline, model)), "full_vae": full}
    found = {}
    for name, decoder in decoders.items():
        draw = functools.partial(decoder.decode, width=model.width, height=model.height)
        compared = compare_priorities(step, draw, device, steps=steps, rounds=rounds)
        found |= {f"{name}_{figure}": value for figure, value in compared.items()}
    return found


def decoded(pipeline: Any, latents: torch.Tensor, size: int) -> PIL.Image.Image:
    """Returns the image of latents by the full VAE, as a user's callback would write it for this family."""
    vae = pipeline.vae
    with torch.no_grad():
        if type(pipeline).__name__ == "QwenImagePipeline":
            latents = pipeline._unpack_latents(latents, size, size, pipeline.vae_scale_factor).to(vae.dtype)
            shape = (1, vae.config.z_dim, 1, 1, 1)
            mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
            std = torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
            image = vae.decode(latents * std + mean).sample[:, :, 0]
        else:
            if hasattr(pipeline, "_unpack_latents"):
                latents = pipeline._unpack_latents(latents, size, size, pipeline.vae_scale_factor)
            latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
            image = vae.decode(latents.to(vae.dtype)).sample
        return pipeline.image_processor.postprocess(image)[0]


def jpeg(image: PIL.Image.Image) -> bytes:
    """Returns the image as a JPEG of quality 75."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=75)
    return file.getvalue()


def largest_input(pipeline: Any, model: ModelInfo) -> int:
    """Returns the number of elements of the largest tensor in a default call of the denoiser."""
    return largest(*sample_calls(pipeline, model)[0])


def largest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Returns the number of elements of the first tensor: the latents."""
    return next(each.numel() for each in tensors([*args, *kwargs.values()]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
