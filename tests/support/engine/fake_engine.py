"""An engine without a model, whose steps happen when a test allows them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.failpoints import hit
from calotype_server.types import (
    Decoding,
    Denoising,
    EncodingPrompt,
    Event,
    ModelInfo,
    Notice,
    Noticed,
    Pixels,
    PreviewMethod,
    PreviewReady,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.engine.protocol import Stop
    from calotype_server.types import Job

MODEL = ModelInfo(
    name="fake",
    pipeline="FakePipeline",
    width=64,
    height=64,
    size_multiple=8,
    step_count=4,
    guidance_scale=3.0,
    takes_negative_prompt=True,
    scheduler="DDIMScheduler",
    schedulers=("DDIMScheduler", "EulerDiscreteScheduler"),
    max_prompt_tokens=16,
    device="cpu",
    dtype="float32",
    preview_methods=(PreviewMethod.HEAD, PreviewMethod.FULL_VAE),
)


_ALL_STEPS = 10_000
"""More steps than any test makes. A semaphore counts to it one by one, so a million would take 0.4 s."""


def flat_pixels(width: int, height: int, value: int) -> Pixels:
    """Returns a grey image."""
    return Pixels(width, height, bytes([value % 256]) * (width * height * 3))


class FakeEngine:
    """Runs jobs step by step; after `hold()` every step waits for `allow(n)`."""

    model = MODEL

    def __init__(self) -> None:
        self.failure: Exception | None = None
        """If set, it is raised after the first step of every job."""
        self.notices: tuple[Notice, ...] = ()
        """Warnings of every job."""
        self.late_notices: tuple[Notice, ...] = ()
        """Warnings of every job that is decoded."""
        self.preview_size = (8, 8)
        """Width and height of every preview, in pixels."""
        self.jobs: list[Job] = []
        self.stops: list[threading.Event] = []
        """The `stop` of every run, in the order of `jobs`."""
        self.active = 0
        self.most_active = 0
        self.stopped = threading.Semaphore(0)
        """Released whenever a run ends because of its `stop`."""
        self.at_step = threading.Semaphore(0)
        """Released whenever a run is about to make a step."""
        self.decoding = threading.Event()
        """Runs finish decoding when it is set; it is set until a test clears it."""
        self.decoding.set()
        self._permits: threading.Semaphore | None = None
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Blocks all steps until `allow`."""
        self._permits = threading.Semaphore(0)

    def allow(self, steps: int = _ALL_STEPS) -> None:
        """Allows a number of steps."""
        assert self._permits is not None
        self._permits.release(steps)

    def run(self, job: Job, report: Callable[[Event], None], stop: Stop) -> Pixels:
        """See `engine.protocol`."""
        stopped = threading.Event()
        stop.call(stopped.set)
        with self._lock:
            self.jobs.append(job)
            self.stops.append(stopped)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            return self._run(job, report, stop)
        finally:
            with self._lock:
                self.active -= 1

    def _run(self, job: Job, report: Callable[[Event], None], stop: Stop) -> Pixels:
        report(EncodingPrompt(self.notices))
        report(Denoising(0, job.step_count))
        for step in range(1, job.step_count + 1):
            self.at_step.release()
            if self._permits is not None:
                self._permits.acquire()
            if stop.is_set():
                self.stopped.release()
                raise errors.Cancelled("stopped")
            hit("engine.step")
            report(PreviewReady(step, job.step_count, flat_pixels(*self.preview_size, step), PreviewMethod.HEAD))
            if self.failure is not None:
                raise self.failure
            if stop.finishing and step < job.step_count:
                computed = job.computed_steps(step, job.step_count)
                report(Decoding(finished_early=True, computed_steps=computed))
                self.decoding.wait()
                return flat_pixels(job.width, job.height, step)
        report(Decoding(computed_steps=job.computed_step_count))
        self.decoding.wait()
        if self.late_notices:
            report(Noticed(self.late_notices))
        return flat_pixels(job.width, job.height, job.seed)

    def note_preview_encoding(self, seconds: float) -> None:
        """Ignores it: there is no budget."""

    def close(self) -> None:
        """Releases all held runs."""
        self.decoding.set()
        if self._permits is not None:
            self.allow()
