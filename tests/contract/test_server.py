"""Ports and their services: health, reflection, draining and malformed requests."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.service import GenerationService
from calotype_server.auth.access import Access
from calotype_server.errors import AddressInUse
from calotype_server.transport.grpc.server import NativeServer
from calotype_server.transport.grpc.servicer import GenerationServicer
from calotype_server.transport.grpc.services import Services
from calotype_server.types import PreviewMethod, PreviewOptions
from support.engine.fake_engine import MODEL, FakeEngine
from support.service import LIMITS, Service, read_until, running

SERVICE = "calotype.v1.GenerationService"
PROMPT = pb.GenerateRequest(prompt="a red apple")


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Returns the reason in the details of a status."""
    info = ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return info.reason


async def test_calls_are_unavailable_until_the_model_is_loaded(grpc_transport: str) -> None:
    """Methods return UNAVAILABLE, and health is NOT_SERVING for the service and for the whole server."""
    async with running(FakeEngine(), opened=False, transport=grpc_transport) as service:
        for call in (service.stub.GetModel(pb.GetModelRequest()), service.stub.Generate(PROMPT).read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert reason_of(caught.value) == "NOT_READY"
        health = health_pb2_grpc.HealthStub(service.channel)
        for name in (SERVICE, ""):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await service.services.set_serving(True)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_can_be_watched(grpc_transport: str) -> None:
    """A watcher receives each change; interceptors also support handlers that call `context.write`."""
    async with running(FakeEngine(), transport=grpc_transport) as service:
        watch = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await service.services.set_serving(False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


REFLECTION = ("grpc.reflection.v1", "grpc.reflection.v1alpha")


async def reflect(service: Service, package: str, **request: str) -> reflection_pb2.ServerReflectionResponse:
    """Returns the response of one version of reflection; the messages of both are the same."""
    call = service.channel.stream_stream(
        f"/{package}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    return await call(iter([reflection_pb2.ServerReflectionRequest(**request)])).read()


@pytest.mark.parametrize("package", REFLECTION)
async def test_reflection_lists_the_services(package: str) -> None:
    """Tools such as `buf curl` work without a proto file, with both versions of the protocol."""
    async with running(FakeEngine()) as service:
        answer = await reflect(service, package, list_services="")
    names = {each.name for each in answer.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", *(f"{each}.ServerReflection" for each in REFLECTION)}


@pytest.mark.parametrize("package", REFLECTION)
async def test_reflection_describes_every_service_that_it_lists(package: str) -> None:
    """Tools can load the descriptors of all listed services, reflection included."""
    async with running(FakeEngine()) as service:
        for name in (SERVICE, "grpc.health.v1.Health", *(f"{each}.ServerReflection" for each in REFLECTION)):
            answer = await reflect(service, package, file_containing_symbol=name)
            pool = DescriptorPool()
            for file in reversed(answer.file_descriptor_response.file_descriptor_proto):
                pool.AddSerializedFile(file)
            assert pool.FindServiceByName(name).methods


async def test_get_model_returns_the_operators_limits(transport: str) -> None:
    """GetModel returns the pipeline's capabilities and the limits of the operator."""
    async with running(FakeEngine(), transport=transport) as service:
        model = await service.stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.width_px, model.size_multiple_px) == (MODEL.name, 64, 8)
    assert (model.max_pixels, model.max_step_count) == (LIMITS.max_pixels, LIMITS.max_step_count)
    assert list(model.schedulers) == list(MODEL.schedulers)
    assert model.guidance_scale == 3.0


async def test_get_model_describes_preview_options() -> None:
    """It returns defaults for every field, maxima, and the methods that are both available and allowed."""
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
    """The second server fails with an explanation, instead of silently receiving half of the calls."""
    async with running(FakeEngine()) as service:
        port = service.address.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost"):
            second = NativeServer(Services(GenerationServicer(GenerationService(LIMITS), Access())), Access())
            with pytest.raises(AddressInUse, match="--grpc-address"):
                await second.start(f"{host}:{port}")
            await second.stop(0)


async def test_draining_finishes_accepted_generations_and_rejects_new_ones(transport: str) -> None:
    """New calls get UNAVAILABLE with the reason DRAINING; the running generation succeeds."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport=transport) as service:
        accepted = service.stub.Generate(PROMPT)
        await accepted.read()
        service.generations.reject_new(retry_after=5.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Generate(PROMPT).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "DRAINING"
        engine.allow()
        await service.generations.idle()
        await read_until(accepted, pb.PHASE_SUCCEEDED)


async def test_generations_aborted_by_draining_end_as_unavailable(transport: str) -> None:
    """Running and queued generations both get a typed end with a retry delay, not a broken stream."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport=transport) as service:
        calls = []
        for _ in range(2):
            calls.append(service.stub.Generate(PROMPT))
            await calls[-1].read()
        service.generations.reject_new(retry_after=5.0)
        ending = asyncio.create_task(service.generations.abort_all())
        # The queued generation, the last one, ends at once; the running one ends after its step.
        for call in reversed(calls):
            end = await read_until(call, pb.PHASE_FAILED)
            engine.allow()
            assert end.error.reason == "DRAINING"
            assert end.error.retry_delay.ToNanoseconds() == 2_000_000_000
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await ending


async def test_oversized_and_malformed_requests_get_a_status(grpc_transport: str) -> None:
    """A 1 MB prompt, invalid bytes and an unknown method each get an error status; the next call succeeds."""
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
    """The text of the exception is only logged; the caller gets INTERNAL."""

    def broken(*_: object) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(GenerationService, "model", broken)
    async with running(FakeEngine(), transport=transport) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.GetModel(pb.GetModelRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
