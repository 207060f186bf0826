"""Compares priorities of the stream that previews are computed on, next to a denoiser on a CUDA device.

CUDA has two useful priorities: 0, which the default stream has, is the lowest. So previews have a lower priority than
the denoiser only if the denoiser leaves the default stream.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.preview.device_stream import CudaStream, device_stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.engine.preview.device_stream import DeviceStream

_HIGH = -1

PRIORITIES = ("default", "high", "low")
"""Of the previews, relative to the denoiser."""


def compare_priorities(
    step: Callable[[], torch.Tensor],
    draw: Callable[[torch.Tensor], Any],
    device: torch.device,
    *,
    steps: int = 20,
    rounds: int = 5,
) -> dict[str, float]:
    """Returns the time of the steps with a preview of each one, relative to the time without previews.

    The ways take turns, and the fastest of all rounds counts. Also returns the mean time from a step's launch to its
    preview for each priority, relative to the time of a step without previews, as `latency_...`.

    Args:
        step: Launches one step on the current stream, and returns its predicted x0.
        draw: Computes the preview of a predicted x0 on the current stream, and may wait for it.
        device: The device of both. On a CPU all priorities are the same.
        steps: Steps in a run.
        rounds: Runs of each way.
    """
    best = dict.fromkeys(("none", *PRIORITIES), math.inf)
    latency = dict.fromkeys(PRIORITIES, math.inf)
    for name in best:
        _run(step, draw, device, 2, name)  # to warm up
    for _ in range(rounds):
        for name in best:
            seconds, waited = _run(step, draw, device, steps, name)
            best[name] = min(best[name], seconds)
            if name in latency:
                latency[name] = min(latency[name], waited)
    one_step = best["none"] / steps
    return {
        **{name: best[name] / best["none"] for name in PRIORITIES},
        **{f"latency_{name}": latency[name] / one_step for name in PRIORITIES},
    }


def _run(
    step: Callable[[], torch.Tensor], draw: Callable[[torch.Tensor], Any], device: torch.device, steps: int, name: str
) -> tuple[float, float]:
    """Returns the seconds of all steps, and the mean seconds from the launch of a step to its preview."""
    stream = _stream(device, name)
    launched: queue.SimpleQueue[Any] = queue.SimpleQueue()
    waits: list[float] = []

    def preview() -> None:
        while (item := launched.get()) is not None:
            latents, event, since = item
            with torch.no_grad(), stream.after([event]):
                draw(latents)
            waits.append(time.perf_counter() - since)

    drawer = threading.Thread(target=preview)
    drawer.start()
    _wait(device)
    with torch.no_grad(), _denoiser_stream(device, name):
        started = time.perf_counter()
        for _ in range(steps):
            latents = step()
            if name != "none":
                launched.put((latents, stream.record(), time.perf_counter()))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        seconds = time.perf_counter() - started
    launched.put(None)
    drawer.join()
    _wait(device)
    return seconds, sum(waits) / max(1, len(waits))


def _stream(device: torch.device, name: str) -> DeviceStream:
    return CudaStream(device, _HIGH) if device.type == "cuda" and name == "high" else device_stream(device)


def _denoiser_stream(device: torch.device, name: str) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda" or name != "low":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device, _HIGH))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
