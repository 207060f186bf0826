"""Measures the cost of streaming as ratios of alternating measurements in one run, so that a slow machine cancels out.

`make bench` prints a table and writes build/bench.json, a flat object of numbers by name.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Same as in the server, so that both sides of every ratio compute alike. Torch reads it on import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import calotype
from benchmarks import (
    concurrency,
    images,
    launch_bound,
    loras,
    previews,
    runtimes,
    step_cache,
    subscribers,
    transports,
    turns,
    web,
)
from benchmarks.runs import GUIDANCE, STEPS, bundled
from support.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = int(os.environ.get("ROUNDS", "16"))
PROMPT = "a red apple"
OUTPUT = Path("build/bench.json")
GOALS = {
    "stream_over_bare": "<= 1.02",
    "first_preview_steps": "<= 2.5",
    "cancel_steps": "<= 1.2",
    "throughput8_over_fifo": ">= 1.7",
    "first_preview8_over_fifo": "<= 0.25",
    "png_over_pillow": "<= 0.15",
    "png_bytes_over_pillow": "<= 1.1",
    "python_beside_png": ">= 0.9",
    **{
        f"turns8_{kind}{steps}_{name}_over_fifo": goal
        for kind in ("sleeping", "spinning")
        for steps, goals in ((20, ("<= 0.1", "<= 1.05", ">= 0.98")), (4, ("<= 0.35", "<= 1.2", ">= 0.98")))
        for name, goal in zip(("first_preview", "completion", "throughput"), goals, strict=True)
    },
    "openvino_rows2_over_eager": "<= 0.6",
    "openvino_request_over_eager": "<= 0.6",
    "fast_speedup": ">= 1.5",
    "fast_psnr_db": ">= 25",
    "readers200_denoise_over_1": "<= 1.02",
    **{
        f"lora_{kind}_over_without_{name}": goal
        for kind, goal in (("same", "<= 1.15"), ("mixed", "<= 1.15"), ("loaded", "<= 1.03"))
        for name in ("bundled", *(f"tiny_{family}" for family in loras.TINY))
    },
    "launch_bound_spinning_silent_over_bare": "<= 1.05",
    "launch_bound_spinning_stream_over_bare": "<= 1.05",
    "launch_bound_sleeping_silent_over_bare": "<= 1.05",
    "launch_bound_sleeping_stream_over_bare": "<= 1.05",
    "web_over_native1": ">= 1",
    "web_over_native16": ">= 1",
}


def main() -> None:
    """Runs all measurements, and prints and saves the figures of each as soon as it ends."""
    print(f"{'':42} {'measured':>10} {'goal':>8}")
    table = Table()
    pipeline, _ = bundled()
    threads = torch.get_num_threads()
    # The server chooses its number of threads as usual: for the denoiser, the same as for the bare call.
    with ServerProcess("--log-level", "warning") as server, calotype.Client(server.address) as client:
        table.add({"threads": threads})
        table.add(cost_of_streaming(pipeline, client))
        table.add(first_previews(client))
        table.add(previews.stream_bytes(client))
    table.add(cancels(threads, table.figures["step_ms"]))
    table.add(concurrency.measure(max(1, ROUNDS // 4), threads))
    table.add(turns.measure(max(1, ROUNDS // 4)))
    table.add(step_cache.measure(max(1, ROUNDS // 2), threads))
    table.add(subscribers.measure(ROUNDS, threads))
    table.add(previews.measure())
    table.add(images.measure(ROUNDS))
    table.add(loras.measure(ROUNDS))
    table.add(launch_bound.measure(ROUNDS))
    table.add(runtimes.measure(ROUNDS))
    table.add(web.measure(ROUNDS))
    table.add(transports.measure(ROUNDS))


class Table:
    """The figures so far, on the screen and in `OUTPUT`.

    Attributes:
        figures: All figures by name.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def add(self, figures: dict[str, float]) -> None:
        """Prints and saves further figures."""
        self.figures |= figures
        OUTPUT.parent.mkdir(exist_ok=True)
        OUTPUT.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        for name, value in figures.items():
            print(f"{name:42} {value:10.3f} {GOALS.get(name, ''):>8}", flush=True)


def cost_of_streaming(pipeline: Any, client: calotype.Client) -> dict[str, float]:
    """Returns the wall time of a stream with a preview at every step, and of the usual callback, over the bare call."""

    def bare() -> None:
        picture(pipeline)

    def seed_style() -> None:
        picture(pipeline, callback_on_step_end=decode_and_encode)

    dropped = []

    def stream() -> None:
        generation = client.generate(PROMPT, seed=1, steps=STEPS, guidance_scale=GUIDANCE)
        generation.result()
        dropped.append(generation.progress.previews_dropped)

    def silent() -> None:
        client.generate(
            PROMPT, seed=1, steps=STEPS, guidance_scale=GUIDANCE, previews=calotype.Previews(method="none")
        ).result()

    times = interleaved({"bare": bare, "silent": silent, "stream": stream, "seed_style": seed_style})
    return {
        "stream_over_bare": ratio(times, "stream", "bare"),
        "stream_over_silent": ratio(times, "stream", "silent"),
        "seed_style_over_bare": ratio(times, "seed_style", "bare"),
        "bare_seconds": statistics.median(times["bare"]),
        "stream_seconds": statistics.median(times["stream"]),
        "previews_dropped_share": sum(dropped) / (len(dropped) * STEPS),
    }


def first_previews(client: calotype.Client) -> dict[str, float]:
    """Returns the time to the first preview, in steps."""
    steps, firsts = [], []
    for round_number in range(ROUNDS):
        started, first = time.perf_counter(), None
        generation = client.generate(PROMPT, seed=round_number, steps=STEPS)
        for progress in generation:
            if progress.preview is not None and first is None:
                first = time.perf_counter() - started
        steps.append(generation.progress.timings.denoising / STEPS)
        firsts.append(first / steps[-1])
    return {"first_preview_steps": statistics.median(firsts), "step_ms": 1000 * statistics.median(steps)}


def cancels(threads: int, step_ms: float) -> dict[str, float]:
    """Returns the time from a cancel until the only slot works for the next caller, in steps."""
    waits = []
    options = ("--log-level", "warning", "--threads", str(threads), "--max-active", "1")
    with ServerProcess(*options) as server, calotype.Client(server.address) as client:
        for round_number in range(ROUNDS):
            left = client.generate(PROMPT, seed=round_number, steps=STEPS)
            for progress in left:
                if progress.step >= 3 + round_number % 8:
                    started = time.perf_counter()
                    left.cancel()
                    break
            for progress in client.generate(PROMPT, steps=1):
                if progress.phase is not calotype.Phase.QUEUED:
                    waits.append((time.perf_counter() - started) * 1000 / step_ms)
                    break
    return {"cancel_steps": statistics.median(waits), "cancel_steps_max": max(waits)}


def picture(pipeline: Any, **options: Any) -> None:
    """Calls the bare pipeline with the server's settings."""
    pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(1),
        **options,
    )


def decode_and_encode(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The usual `callback_on_step_end`: decodes with the full VAE and writes a JPEG while the denoiser waits."""
    latents = tensors["latents"] / pipeline.vae.config.scaling_factor
    with torch.no_grad():
        image = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)[0]
    image.save(io.BytesIO(), "jpeg", quality=75)
    return tensors


def interleaved(functions: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Returns the wall seconds of each function, called in turn in every round.

    Each function is called twice, and only the second call counts: the server and the bare pipeline are two processes,
    and otherwise the one that ran last would have its weights in the processor's cache.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            function()
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Returns the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


if __name__ == "__main__":
    main()
