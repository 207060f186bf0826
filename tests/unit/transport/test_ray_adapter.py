"""The class with one method per RPC that Ray Serve calls."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from calotype_server.auth.access import Access
from calotype_server.errors import GenerationNotFound
from calotype_server.transport.cluster.ray_adapter import HandlerRegistry, RayServicer, rpc_methods
from calotype_server.transport.grpc.interceptors import interceptors


class ServeContext:
    """Imitates Serve's context, which stores a status and trailing metadata."""

    def __init__(self) -> None:
        self.status, self.trailing = (grpc.StatusCode.OK, ""), []

    def invocation_metadata(self):
        return [("x-request-id", "r1")]

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def code(self):
        return self.status[0]

    def set_code(self, code):
        self.status = code, self.status[1]

    def set_details(self, details):
        self.status = self.status[0], details

    def set_trailing_metadata(self, metadata):
        self.trailing = metadata


class Servicer(GenerationServiceServicer):
    """`Generate` yields two messages and raises; `Cancel` returns or raises."""

    closed = False

    async def Generate(self, request, context):  # noqa: N802
        try:
            yield pb.Progress(sequence=1, seed=int(context.time_remaining() is None))
            yield pb.Progress(sequence=2)
            raise GenerationNotFound("Gone.")
        finally:
            self.closed = True

    async def Cancel(self, request, context):  # noqa: N802
        if not request.generation_id:
            raise ValueError("a secret")
        return pb.CancelResponse(phase=pb.PHASE_QUEUED)


@rpc_methods(pb.DESCRIPTOR.services_by_name["GenerationService"])
class Replica(RayServicer):
    """Like the replica in `apps.ray`."""

    def __init__(self) -> None:
        self.handlers = HandlerRegistry(interceptors(Access()))
        self.servicer = Servicer()
        registry: Any = self.handlers
        add_GenerationServiceServicer_to_server(self.servicer, registry)


def make_replica() -> Any:
    """Returns a replica, whose RPC methods exist only at run time."""
    return Replica()


def details(context: ServeContext) -> status_pb2.Status:
    """Returns the status with its details."""
    return status_pb2.Status.FromString(dict(context.trailing)["grpc-status-details-bin"])


async def test_a_stream_forwards_messages_and_sets_the_status_of_an_error() -> None:
    """The method sets the status and returns, since Serve drops the details of a raised error."""
    context = ServeContext()
    seen = [message async for message in make_replica().Generate(pb.GenerateRequest(), context)]
    assert [(message.sequence, message.seed) for message in seen] == [(1, 1), (2, 0)]
    assert context.status == (grpc.StatusCode.NOT_FOUND, "Gone.")
    assert details(context).code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_leaving_a_stream_closes_the_servicer() -> None:
    """When Serve closes the generator, the servicer's generator is closed at once."""
    replica = make_replica()
    stream = replica.Generate(pb.GenerateRequest(), ServeContext())
    await anext(stream)
    assert not replica.servicer.closed
    await stream.aclose()
    assert replica.servicer.closed


async def test_a_unary_method_returns_its_answer_and_hides_exceptions() -> None:
    """An answer is returned; an unexpected exception becomes INTERNAL without its text."""
    context = ServeContext()
    answer = await make_replica().Cancel(pb.CancelRequest(generation_id="x"), context)
    assert answer.phase == pb.PHASE_QUEUED
    assert context.status == (grpc.StatusCode.OK, "")
    rejected = await make_replica().Cancel(pb.CancelRequest(), context)
    assert rejected.SerializeToString() == b""
    assert context.status[0] is grpc.StatusCode.INTERNAL
    assert "secret" not in context.status[1]


@pytest.mark.parametrize("method", ["Generate", "Cancel"])
async def test_a_call_without_a_key_is_rejected(tmp_path, method: str) -> None:
    """Interceptors apply to streaming and unary methods."""
    keys = tmp_path / "keys"
    keys.write_text("key = []")
    replica, context = make_replica(), ServeContext()
    replica.handlers = HandlerRegistry(interceptors(Access(keys)))
    add_GenerationServiceServicer_to_server(replica.servicer, replica.handlers)
    call = getattr(replica, method)(getattr(pb, f"{method}Request")(), context)
    if method == "Generate":
        assert [message async for message in call] == []
    else:
        await call
    assert context.status[0] is grpc.StatusCode.UNAUTHENTICATED


def test_the_class_can_be_pickled() -> None:
    """Ray pickles the class to send it to other processes."""
    assert pickle.loads(pickle.dumps(Replica)) is Replica
