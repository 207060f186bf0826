"""Jobs on an engine, with everything that it reports kept."""

from __future__ import annotations

import threading

from calotype_server.engine.protocol import Stop
from calotype_server.types import Job

PATIENCE = 20
"""Seconds until a test that waits for something gives up."""

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
    """Runs a job, keeps its events, and can wait for a step to be told."""

    def __init__(self, engine):
        self.engine = engine
        self.events = []
        self.stop = Stop()
        self._told = threading.Condition()

    def __call__(self, job=JOB):
        return self.engine.run(job, self.report, self.stop)

    def report(self, event):
        with self._told:
            self.events.append(event)
            self._told.notify_all()

    def wait_for_step(self, number):
        with self._told:
            assert self._told.wait_for(lambda: any(getattr(e, "step", -1) >= number for e in self.events), PATIENCE)

    def wait_before_each_evaluation(self, denoiser):
        """Gives the preview thread time to draw every step: the denoiser waits until the one before was told."""
        numbers = iter(range(1_000_000))

        def wait(module, inputs):
            # The preview thread asks the denoiser as well: once for each size that it decodes in full.
            if threading.current_thread().name != "calotype-preview":
                self.wait_for_step(next(numbers))

        return denoiser.register_forward_pre_hook(wait)

    @property
    def kinds(self):
        return [type(event) for event in self.events]
