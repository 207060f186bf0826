"""The product on Ray with an engine that fails or hangs for good when a prompt says so."""

import threading

from ray import serve

from calotype_server.apps import ray
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


class MortalReplica(ray.Replica):
    """Ray imports this module in each replica, because the class is defined here."""

    @staticmethod
    async def load(*_: object) -> MortalEngine:
        """Returns the mortal engine instead of loading a model."""
        return MortalEngine()


app = serve.deployment(name="Calotype")(MortalReplica).bind()
