"""The scripted servicer as a deployment of Ray Serve, made by the product's adapter: what `make bench-ray` measures."""

from ray import serve

from benchmarks.scripted import ScriptedServicer
from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import add_GenerationServiceServicer_to_server
from calotype_server.access import Access
from calotype_server.transport.delegation import Delegate, Handlers, delegating
from calotype_server.transport.interceptors import interceptors


@delegating(pb.DESCRIPTOR.services_by_name["GenerationService"])
class Scripted(Delegate):
    """Does what the request says."""

    def __init__(self) -> None:
        self.handlers = Handlers(interceptors(Access()))
        add_GenerationServiceServicer_to_server(ScriptedServicer(), self.handlers)


app = serve.deployment(name="Calotype")(Scripted).bind()
