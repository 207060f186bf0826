"""Calotype on Ray with an engine that fails or hangs on certain prompts."""

import threading

from ray import serve

from calotype_server.apps import ray
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


class MortalReplica(ray.Replica):
    """Ray imports this module in each replica, because the class is defined here."""

    @staticmethod
    async def load(*_: object) -> MortalEngine:
        """Returns the mortal engine instead of loading a model."""
        return MortalEngine()


app = serve.deployment(name="Calotype")(MortalReplica).bind()
