"""OpenTelemetry spans of generations and their phases. Needs the extra `[otel]`; off by default.

Spans are created when a generation ends, from the times recorded while it ran, so tracing costs nothing while an image
is denoised. Their parent is the caller's span, from the `traceparent` that the transport binds as a context variable.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server import threads
from calotype_server.errors import Cancelled, TracingUnavailable
from calotype_server.observability.events import GenerationEnded
from calotype_server.types import Failed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import TracerProvider

    from calotype_server.observability.events import Observation, PhaseSpan

__all__ = ["Tracing", "from_environment", "is_configured"]

_log = structlog.get_logger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FLUSH_SECONDS = 2.0


def is_configured(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the standard OTEL_... variables name a destination for spans."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    return exporter not in ("", "none") or (not exporter and any(environment.get(name) for name in _ENDPOINTS))


def from_environment(version: str, *, required: bool) -> Tracing | None:
    """Sets up tracing from the standard OTEL_... variables.

    Args:
        version: Version of Calotype.
        required: Whether to raise, instead of logging a warning, when OpenTelemetry is not installed.

    Returns:
        None when OpenTelemetry is not installed and not required.

    Raises:
        TracingUnavailable: OpenTelemetry is required but not installed, or the configured exporter does not exist.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        if required:
            raise TracingUnavailable("--tracing needs OpenTelemetry: pip install 'calotype[server,otel]'.") from None
        _log.warning("tracing is off: OpenTelemetry is not installed", install="pip install 'calotype[server,otel]'")
        return None
    # OpenTelemetry's specification treats an empty variable as unset.
    name = os.environ.get("OTEL_SERVICE_NAME")
    service = {"service.name": name or "calotype", "service.version": version}
    if not name and "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        del service["service.name"]
    provider = TracerProvider(resource=Resource.create(service), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    return Tracing(provider, version)


class Tracing:
    """Creates spans of ended generations.

    Args:
        provider: A tracer provider of OpenTelemetry's SDK.
        version: Version of Calotype.
    """

    def __init__(self, provider: TracerProvider, version: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("calotype_server", version)

    def observe(self, observation: Observation) -> None:
        """Creates the spans of a generation that ended; ignores other observations."""
        if isinstance(observation, GenerationEnded):
            self._trace(observation)

    def close(self) -> None:
        """Sends the remaining spans; gives up after two seconds."""
        # An exporter that cannot reach its collector retries for much longer than its timeout.
        threads.start("tracing", self._provider.shutdown).join(_FLUSH_SECONDS)

    def _trace(self, ended: GenerationEnded) -> None:
        from opentelemetry import trace

        job, end = ended.job, ended.end
        error = end.error if isinstance(end, Failed) else None
        attributes: dict[str, Any] = {
            "calotype.generation_id": ended.generation_id,
            "calotype.outcome": "succeeded" if error is None else error.reason,
            "calotype.width_px": job.width,
            "calotype.height_px": job.height,
            "calotype.scheduler": job.scheduler,
        }
        # Spans use Unix time, phases monotonic time.
        offset = time.time() - time.monotonic()
        start, end_time = (int((seconds + offset) * 1e9) for seconds in (ended.phases[0].begin, ended.phases[-1].end))
        whole = self._tracer.start_span(
            "generation", context=_parent(), kind=trace.SpanKind.SERVER, attributes=attributes, start_time=start
        )
        within = trace.set_span_in_context(whole)
        failed = error is not None and not isinstance(error, Cancelled)
        for phase in ended.phases:
            span = self._tracer.start_span(
                phase.name,
                context=within,
                attributes=_attributes(ended, phase),
                start_time=int((phase.begin + offset) * 1e9),
            )
            if failed and phase is ended.phases[-1]:
                span.set_status(trace.StatusCode.ERROR)
            span.end(int((phase.end + offset) * 1e9))
        if failed and error is not None:
            whole.set_status(trace.StatusCode.ERROR, error.reason)
        whole.end(end_time)


def _attributes(ended: GenerationEnded, phase: PhaseSpan) -> dict[str, Any]:
    if phase.name != "denoise":
        return {}
    known = {"calotype.batch_rows": ended.batch_rows} if ended.batch_rows else {}
    return {"calotype.step_count": ended.steps, **known}


def _parent() -> Any:
    """Returns a context with the caller's span; an empty context when the call has no valid `traceparent`."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": structlog.contextvars.get_contextvars().get("traceparent", "")}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _exporter() -> Any:
    """Returns an instance of the installed exporter that the variables name."""
    name = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if name == "otlp":
        variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = next(filter(None, map(os.environ.get, variables)), "http/protobuf")
        name = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    found = list(importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name))
    if not found:
        raise TracingUnavailable(f"No OpenTelemetry exporter named {name!r} is installed; check OTEL_TRACES_EXPORTER.")
    return found[0].load()()
