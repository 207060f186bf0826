"""Spans of real calls: parents on every transport, times and attributes."""

from __future__ import annotations

import builtins

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from calotype.v1 import calotype_pb2 as pb
from calotype_server.errors import GenerationFailed, TracingUnavailable
from calotype_server.observability import tracing
from calotype_server.observability.tracing import Tracing
from support.engine.fake_engine import FakeEngine
from support.service import GRPC_TRANSPORTS, read_until, running

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)
PROMPT = pb.GenerateRequest(prompt="unmistakable", step_count=3)
PHASES = ["queue", "encode_prompt", "denoise", "decode", "encode_image"]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """An exporter that keeps spans in memory."""
    return InMemorySpanExporter()


@pytest.fixture
def observe(exporter: InMemorySpanExporter):
    """An observer that creates spans."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield Tracing(provider, "1").observe
    provider.shutdown()


@pytest.mark.parametrize("transport", [*GRPC_TRANSPORTS, "sse"])
async def test_a_generation_is_a_span_of_the_callers_trace(transport: str, exporter, observe) -> None:
    """The span has one child per phase, in order and without gaps, and does not contain the prompt."""
    async with running(FakeEngine(), transport=transport, observe=observe) as service:
        end = await read_until(service.stub.Generate(PROMPT, metadata=PARENT), pb.PHASE_SUCCEEDED)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    whole = spans.pop("generation")
    assert sorted(spans, key=PHASES.index) == PHASES
    assert {f"{span.context.trace_id:032x}" for span in (whole, *spans.values())} == {TRACE}
    assert f"{whole.parent.span_id:016x}" == CALLER
    assert whole.kind is SpanKind.SERVER
    assert {span.parent.span_id for span in spans.values()} == {whole.context.span_id}
    bounds = [whole.start_time, *(spans[name].end_time for name in PHASES)]
    assert [spans[name].start_time for name in PHASES] == bounds[:-1]
    assert bounds == sorted(bounds)
    assert whole.end_time == bounds[-1]
    assert whole.attributes["calotype.generation_id"] == end.generation_id
    assert spans["denoise"].attributes["calotype.step_count"] == 3
    assert "unmistakable" not in str([span.to_json() for span in exporter.get_finished_spans()])


@pytest.mark.parametrize("given", ["", "00-" + "0" * 32 + f"-{CALLER}-01", f"00-{TRACE}-{CALLER}", "nonsense"])
async def test_without_a_valid_parent_a_new_trace_starts(given: str, exporter, observe) -> None:
    """An invalid trace context is ignored."""
    async with running(FakeEngine(), observe=observe) as service:
        metadata = (("traceparent", given),) if given else None
        await read_until(service.stub.Generate(PROMPT, metadata=metadata), pb.PHASE_SUCCEEDED)
    whole = next(span for span in exporter.get_finished_spans() if span.name == "generation")
    assert whole.parent is None


async def test_the_sampling_decision_of_the_caller_is_respected(exporter, observe) -> None:
    """Without the sampled flag in the parent, no span is exported."""
    async with running(FakeEngine(), observe=observe) as service:
        metadata = (("traceparent", f"00-{TRACE}-{CALLER}-00"),)
        await read_until(service.stub.Generate(PROMPT, metadata=metadata), pb.PHASE_SUCCEEDED)
    assert not exporter.get_finished_spans()


async def test_failures_are_marked_and_cancels_are_not(exporter, observe) -> None:
    """An error marks the phase in which it happened; a cancel is no error."""
    engine = FakeEngine()
    engine.failure = GenerationFailed("secret")
    async with running(engine, observe=observe) as service:
        with pytest.raises(grpc.aio.AioRpcError):
            _ = [message async for message in service.stub.Generate(PROMPT)]
        failed = {span.name: span for span in exporter.get_finished_spans()}
        exporter.clear()
        engine.hold()
        call = service.stub.Generate(PROMPT)
        generation_id = (await call.read()).generation_id
        await service.stub.Cancel(pb.CancelRequest(generation_id=generation_id))
        engine.allow()
        await read_until(call, pb.PHASE_CANCELLED)
        await service.generations.idle()
    cancelled = {span.name: span for span in exporter.get_finished_spans()}
    assert failed["generation"].status.status_code is failed["denoise"].status.status_code is StatusCode.ERROR
    assert failed["generation"].status.description == "GENERATION_FAILED"
    assert failed["queue"].status.status_code is StatusCode.UNSET
    assert cancelled["generation"].status.status_code is StatusCode.UNSET
    assert cancelled["generation"].attributes["calotype.outcome"] == "CANCELLED"
    assert "decode" not in cancelled


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
        ({"OTEL_SERVICE_NAME": "images"}, False),
    ],
)
def test_the_standard_variables_turn_tracing_on(environment: dict[str, str], expected: bool) -> None:
    """Tracing is on if a variable names a destination and none turns it off."""
    assert tracing.is_configured(environment) is expected


@pytest.mark.parametrize(("protocol", "kind"), [("http/protobuf", "http"), ("grpc", "grpc")])
def test_the_exporter_is_the_configured_one(monkeypatch: pytest.MonkeyPatch, protocol: str, kind: str) -> None:
    """OTLP works over either protocol; an exporter that is not installed is an error."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    exporter = tracing._exporter()
    assert f".proto.{kind}." in type(exporter).__module__
    exporter.shutdown()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "carrier-pigeon")
    with pytest.raises(TracingUnavailable, match="carrier-pigeon"):
        tracing._exporter()


def test_a_missing_opentelemetry_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to install it; without --tracing it is only a warning."""
    original = builtins.__import__

    def importing(name: str, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(TracingUnavailable, match=r"pip install 'calotype\[server,otel\]'"):
        tracing.from_environment("1", required=True)
    assert tracing.from_environment("1", required=False) is None


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "calotype"),
        ({"OTEL_SERVICE_NAME": "images"}, "images"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=pictures,team=a"}, "pictures"),
    ],
)
def test_the_service_name_is_configurable(monkeypatch: pytest.MonkeyPatch, environment, name: str) -> None:
    """The default is "calotype"; OpenTelemetry's variables override it."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    made = tracing.from_environment("1", required=True)
    assert made._provider.resource.attributes["service.name"] == name
    made.close()
