"""The scripted servicer as a Ray Serve deployment, built with the product's adapter, for `make bench-ray`."""

from typing import Any

from ray import serve

from benchmarks.scripted import ScriptedServicer
from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import add_GenerationServiceServicer_to_server
from calotype_server.auth.access import Access
from calotype_server.transport.cluster.ray_adapter import HandlerRegistry, RayServicer, rpc_methods
from calotype_server.transport.grpc.interceptors import interceptors


@rpc_methods(pb.DESCRIPTOR.services_by_name["GenerationService"])
class Scripted(RayServicer):
    """The scripted servicer on Ray."""

    def __init__(self) -> None:
        self.handlers = HandlerRegistry(interceptors(Access()))
        registry: Any = self.handlers
        add_GenerationServiceServicer_to_server(ScriptedServicer(), registry)


app = serve.deployment(name="Calotype")(Scripted).bind()
