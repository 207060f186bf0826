"""Runs jobs on an engine and keeps all reported events."""

from __future__ import annotations

import threading

from calotype_server.engine.protocol import Stop
from calotype_server.types import Job

PATIENCE = 20
"""Seconds until a waiting test fails."""

STEPS = 4
JOB = Job(
    prompt="a red apple",
    negative_prompt=None,
    width=64,
    height=48,
    step_count=STEPS,
    guidance_scale=5.0,
    seed=7,
    scheduler="DDIMScheduler",
)


class Run:
    """Runs a job, keeps its events, and can wait until the engine reports a step."""

    def __init__(self, engine):
        self.engine = engine
        self.events = []
        self.stop = Stop()
        self._reported = threading.Condition()

    def __call__(self, job=JOB):
        return self.engine.run(job, self.report, self.stop)

    def report(self, event):
        with self._reported:
            self.events.append(event)
            self._reported.notify_all()

    def wait_for_step(self, number):
        with self._reported:
            reported = self._reported.wait_for(
                lambda: any(getattr(e, "step", -1) >= number for e in self.events), PATIENCE
            )
        assert reported

    def wait_before_each_evaluation(self, denoiser):
        """Makes the denoiser wait until the previous step is reported, so that the preview thread draws every step."""
        numbers = iter(range(1_000_000))

        def wait(module, inputs):
            # The preview thread also calls the denoiser: once for each size that it decodes in full.
            if threading.current_thread().name != "calotype-preview":
                self.wait_for_step(next(numbers))

        return denoiser.register_forward_pre_hook(wait)

    @property
    def kinds(self):
        return [type(event) for event in self.events]
