"""Runs jobs on an engine and keeps all reported events."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import unittest.mock

from calotype_server.engine.batching.session import DenoiserSession
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

    @contextlib.contextmanager
    def with_every_preview(self, steps_done=None):
        """Opens a block in which the request waits after each call of the denoiser until the step before is reported.

        The preview thread then draws every step. It calls the denoiser too, but does not wait.

        Args:
            steps_done: Returns the number of steps before a call; None if there is one call for each step.
        """
        steps_done = steps_done or functools.partial(next, itertools.count())
        call = DenoiserSession._call

        def wait(session, *args, **kwargs):
            answer = call(session, *args, **kwargs)
            if threading.current_thread().name != "calotype-preview":
                self.wait_for_step(steps_done())
            return answer

        with unittest.mock.patch.object(DenoiserSession, "_call", wait):
            yield

    @property
    def kinds(self):
        return [type(event) for event in self.events]
