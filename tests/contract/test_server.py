"""The ports around the service: health, reflection, stopping, and what strangers may send."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.service import Api
from calotype_server.auth.access import Access
from calotype_server.errors import AddressInUse
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.servicer import GenerationServicer
from calotype_server.transport.grpc.services import Services
from calotype_server.types import PreviewMethod, PreviewOptions
from support.engine.fake_engine import MODEL, FakeEngine
from support.service import LIMITS, read_until, running

SERVICE = "calotype.v1.GenerationService"
PROMPT = pb.GenerateRequest(prompt="a red apple")


async def test_before_the_model_is_loaded_calls_are_unavailable(grpc_transport: str) -> None:
    """Every method says UNAVAILABLE, and health says NOT_SERVING for the service and for the whole server."""
    async with running(FakeEngine(), opened=False, transport=grpc_transport) as service:
        for call in (service.stub.GetModel(pb.GetModelRequest()), service.stub.Generate(PROMPT).read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        health = health_pb2_grpc.HealthStub(service.channel)
        for name in (SERVICE, ""):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await service.services.set_serving(True)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_can_be_watched(grpc_transport: str) -> None:
    """A watcher sees the change as it happens: the interceptor leaves writer-style handlers alone."""
    async with running(FakeEngine(), transport=grpc_transport) as service:
        watch = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await service.services.set_serving(False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def test_reflection_lists_the_service() -> None:
    """Tools such as buf curl need no proto file."""
    async with running(FakeEngine()) as service:
        stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {each.name for each in (await call.read()).list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_the_model_is_described_with_the_operators_limits(transport: str) -> None:
    """GetModel carries what the pipeline can do and what the operator allows."""
    async with running(FakeEngine(), transport=transport) as service:
        model = await service.stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.width_px, model.size_multiple_px) == (MODEL.name, 64, 8)
    assert (model.max_pixels, model.max_step_count) == (LIMITS.max_pixels, LIMITS.max_step_count)
    assert list(model.schedulers) == list(MODEL.schedulers)
    assert model.guidance_scale == 3.0


async def test_the_model_tells_how_previews_may_be_ordered() -> None:
    """Defaults with every field set, ceilings, and the methods that are both there and allowed."""
    limits = replace(
        LIMITS,
        max_preview_edge=300,
        max_preview_quality=80,
        preview=PreviewOptions(2, 0.25, 200, 70, PreviewMethod.HEAD),
        preview_methods=frozenset({PreviewMethod.HEAD, PreviewMethod.TINY_VAE}),
    )
    async with running(FakeEngine(), limits=limits) as service:
        model = await service.stub.GetModel(pb.GetModelRequest())
    assert MODEL.preview_methods == (PreviewMethod.HEAD, PreviewMethod.FULL_VAE)
    assert list(model.preview_methods) == [pb.PREVIEW_METHOD_HEAD]
    assert (model.max_preview_edge_px, model.max_preview_quality) == (300, 80)
    assert model.preview == pb.PreviewOptions(
        every_steps=2,
        min_interval=Duration(nanos=250_000_000),
        max_edge_px=200,
        quality=70,
        method=pb.PREVIEW_METHOD_HEAD,
    )


async def test_two_servers_cannot_share_a_port() -> None:
    """The second is told so in words, instead of silently taking half of the calls."""
    async with running(FakeEngine()) as service:
        port = service.address.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost"):
            second = NativeServer(Services(GenerationServicer(Api(LIMITS), Access())), Access())
            with pytest.raises(AddressInUse, match="--grpc-address"):
                await second.start(f"{host}:{port}")
            await second.stop(0)


async def test_draining_finishes_what_was_accepted_and_refuses_the_rest(transport: str) -> None:
    """New calls get UNAVAILABLE with a retry time; the running one ends with its picture."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport=transport) as service:
        accepted = service.stub.Generate(PROMPT)
        await accepted.read()
        service.generations.reject_new(retry_after=5.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Generate(PROMPT).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        engine.allow()
        await service.generations.idle()
        await read_until(accepted, pb.PHASE_SUCCEEDED)


async def test_what_cannot_be_finished_in_time_ends_unavailable(transport: str) -> None:
    """Running and queued generations both get a typed end with a retry time, not a broken stream."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport=transport) as service:
        calls = []
        for _ in range(2):
            calls.append(service.stub.Generate(PROMPT))
            await calls[-1].read()
        service.generations.reject_new(retry_after=5.0)
        ending = asyncio.create_task(service.generations.abort_all())
        # The queued one, last in, ends at once; the running one when its step is over.
        for call in reversed(calls):
            end = await read_until(call, pb.PHASE_FAILED)
            engine.allow()
            assert end.error.reason == "DRAINING"
            assert end.error.retry_delay.ToNanoseconds() == 2_000_000_000
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await ending


async def test_oversized_and_malformed_requests_harm_nobody(grpc_transport: str) -> None:
    """A 1 MB prompt, bytes that are no message, an unknown method: each gets a status, and the service goes on."""
    async with running(FakeEngine(), transport=grpc_transport) as service:
        method = f"/{SERVICE}/Generate"
        for path, body in (
            (method, pb.GenerateRequest(prompt="x" * 1_000_000).SerializeToString()),
            (method, b"\xff\xff\xff\xff"),
            (f"/{SERVICE}/NoSuchMethod", b""),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.channel.unary_stream(path)(body).read()
            assert caught.value.code() is not grpc.StatusCode.OK
        messages = [message async for message in service.stub.Generate(PROMPT)]
    assert messages[-1].phase == pb.PHASE_SUCCEEDED


async def test_an_unexpected_exception_never_reaches_the_caller(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Its text stays in the log; the caller learns only that it was an internal error."""

    def broken(*_: object) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(Api, "model", broken)
    async with running(FakeEngine(), transport=transport) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.GetModel(pb.GetModelRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
