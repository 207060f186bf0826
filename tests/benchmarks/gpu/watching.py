"""The client's side: follows generations over gRPC and keeps what they showed, and when."""

from __future__ import annotations

import asyncio
import io
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import PIL.Image

import calotype

if TYPE_CHECKING:
    from benchmarks.gpu.cases import Case

__all__ = ["PROMPTS", "Seen", "arguments", "cancelled", "psnr_and_levels", "single", "together"]

PROMPTS = ("a red apple", "fox", "banana", "umbrella", "cookie", "broken heart", "alien", "strawberry")

_SECONDS = 600.0
"""Longest duration of a generation."""


@dataclass
class Seen:
    """One stream. Times are in seconds since `started`; None for moments that it did not reach."""

    started: float
    first_work: float | None = None
    first_preview: float | None = None
    last_step: float | None = None
    finished: float | None = None
    previews: int = 0
    steps: int = 0
    timings: calotype.Timings | None = None
    image: bytes = b""
    reason: str = ""
    """Why it failed; empty if it succeeded."""
    _shown: set[int] = field(default_factory=set)

    def take(self, progress: calotype.Progress) -> None:
        """Notes a message."""
        now = time.perf_counter() - self.started
        if self.first_work is None and progress.phase is not calotype.Phase.QUEUED:
            self.first_work = now
        if progress.preview is not None and progress.preview_method is not None:
            self._shown.add(progress.image_step)
            self.previews = len(self._shown)
            if self.first_preview is None:
                self.first_preview = now
        self.steps = progress.total_steps or self.steps
        if self.last_step is None and progress.total_steps and progress.step >= progress.total_steps:
            self.last_step = now
        self.timings = progress.timings or self.timings

    def end(self, image: calotype.Image) -> Seen:
        """Notes the end, and returns itself."""
        self.finished = time.perf_counter() - self.started
        self.image = image.data
        return self

    def pixels(self) -> bytes:
        """Returns the RGB bytes of the final image."""
        return PIL.Image.open(io.BytesIO(self.image)).convert("RGB").tobytes()


def arguments(case: Case, *, method: Any = "none", **changes: Any) -> dict[str, Any]:
    """Returns the arguments of `generate` for a case, with a preview at every step."""
    found = {
        "prompt": PROMPTS[0],
        "seed": 1,
        "steps": case.steps,
        "width": case.size,
        "height": case.size,
        "guidance_scale": case.guidance,
        "previews": calotype.Previews(method=method, every_steps=1),
    }
    return found | changes


def single(address: str, case: Case, **options: Any) -> Seen:
    """Follows one generation to its end; see `arguments` for the options."""
    with calotype.Client(address, retries=0, timeout=_SECONDS) as client:
        client.model()  # The connection is open before the time starts.
        seen = Seen(time.perf_counter())
        generation = client.generate(**arguments(case, **options))
        for progress in generation:
            seen.take(progress)
        return seen.end(generation.result())


def together(address: str, case: Case, requests: list[dict[str, Any]]) -> list[Seen]:
    """Starts several generations at the same time, and follows all to their ends, also those that fail."""

    async def follow() -> list[Seen]:
        async with calotype.AsyncClient(address, retries=0, timeout=_SECONDS) as client:
            await client.model()
            started = time.perf_counter()

            async def one(options: dict[str, Any]) -> Seen:
                seen = Seen(started)
                try:
                    generation = client.generate(**arguments(case, **options))
                    async for progress in generation:
                        seen.take(progress)
                    return seen.end(await generation.result())
                except calotype.CalotypeError as error:
                    seen.finished = time.perf_counter() - started
                    seen.reason = error.reason or error.code
                    return seen

            return await asyncio.gather(*map(one, requests))

    return asyncio.run(follow())


def cancelled(address: str, case: Case, *, at: int, seed: int, steps: int) -> Seen:
    """Cancels a generation after a step, requests the next one at once, and returns that; its time starts then.

    Args:
        address: Of a server with one slot.
        case: What to generate.
        at: The step after which to cancel.
        seed: Of the cancelled generation.
        steps: Of the next generation.
    """
    with calotype.Client(address, retries=0, timeout=_SECONDS) as client:
        left = client.generate(**arguments(case, method="head", seed=seed))
        for progress in left:
            if progress.step >= at:
                break
        seen = Seen(time.perf_counter())
        left.cancel()
        generation = client.generate(**arguments(case, method="head", steps=steps))
        for progress in generation:
            seen.take(progress)
        return seen.end(generation.result())


def psnr_and_levels(ours: bytes, theirs: bytes) -> tuple[float, int]:
    """Returns the peak signal-to-noise ratio in dB, at most 99, and the largest difference in levels of 255."""
    import numpy as np

    a, b = (np.frombuffer(each, np.uint8).astype(np.int32) for each in (ours, theirs))
    difference = np.abs(a - b)
    mse = float((difference**2).mean())
    return (99.0 if not mse else min(99.0, float(10 * np.log10(255**2 / mse)))), int(difference.max())
