"""The product on Ray with an engine that fails or hangs for good when a prompt says so."""

import threading

from ray import serve

from calotype_server.apps import ray, runtime
from calotype_server.errors import EngineDead
from support.engine.fake_engine import FakeEngine


class MortalEngine(FakeEngine):
    """Draws grey pictures, until it is told otherwise."""

    def _run(self, job, report, stop):
        if job.prompt == "die":
            raise EngineDead("The device failed.")
        if job.prompt == "hang":
            threading.Event().wait()
        return super()._run(job, report, stop)


runtime._load_engine = lambda *_: MortalEngine()


class MortalReplica(ray.Replica):
    """Of this module, so that Ray imports it in each replica."""


app = serve.deployment(name="Calotype")(MortalReplica).bind()
