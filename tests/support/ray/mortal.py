"""Calotype on Ray with an engine that fails or hangs on certain prompts."""

import threading

from ray import serve

from calotype_server.apps import ray, runtime
from calotype_server.errors import EngineDead
from support.engine.fake_engine import FakeEngine


class MortalEngine(FakeEngine):
    """Draws grey images, but fails on the prompt "die" and hangs on the prompt "hang"."""

    def _run(self, job, report, stop):
        if job.prompt == "die":
            raise EngineDead("The device failed.")
        if job.prompt == "hang":
            threading.Event().wait()
        return super()._run(job, report, stop)


runtime._load_engine = lambda *_: MortalEngine()


class MortalReplica(ray.Replica):
    """Defined in this module so that Ray imports the module in each replica."""


app = serve.deployment(name="Calotype")(MortalReplica).bind()
