"""Compares `SPEED_FAST` with all steps, and with an exact image of as many computed steps."""

from __future__ import annotations

import io
import math
import statistics
import time
from typing import Any

import numpy as np
from PIL import Image

import calotype
from benchmarks.runs import GUIDANCE
from support.process import ServerProcess

PROMPTS = ("a red apple", "fox", "banana", "umbrella")
STEPS = 28


def measure(rounds: int, threads: int) -> dict[str, float]:
    """Returns the wall time of exact images over fast ones, and the PSNR of fast images and of those with fewer steps.

    Args:
        rounds: Number of measurements; the median counts.
        threads: Number of torch threads.
    """
    ratios, fast_psnr, fewer_psnr, computed = [], [], [], STEPS
    with (
        ServerProcess("--log-level", "warning", "--threads", str(threads), "--step-cache") as server,
        calotype.Client(server.address) as client,
    ):

        def generate(seed: int, **options: Any) -> tuple[np.ndarray, float, int]:
            prompt = PROMPTS[seed % len(PROMPTS)]
            started = time.perf_counter()
            generation = client.generate(prompt, seed=seed, guidance_scale=GUIDANCE, **options)
            data = generation.result().data
            seconds = time.perf_counter() - started
            pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=float)
            return pixels, seconds, generation.progress.timings.computed_steps

        generate(0, steps=STEPS)
        for number in range(rounds):
            exact, exact_seconds, _ = generate(number, steps=STEPS)
            fast, fast_seconds, computed = generate(number, steps=STEPS, speed="fast")
            fewer, _, _ = generate(number, steps=computed)
            ratios.append(exact_seconds / fast_seconds)
            fast_psnr.append(psnr(fast, exact))
            fewer_psnr.append(psnr(fewer, exact))
    return {
        "fast_speedup": statistics.median(ratios),
        "fast_computed_steps": computed,
        "fast_psnr_db": statistics.median(fast_psnr),
        "fewer_steps_psnr_db": statistics.median(fewer_psnr),
    }


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two images in dB."""
    return 20 * math.log10(255) - 10 * math.log10(max(float(((a - b) ** 2).mean()), 1e-6))
