"""OpenTelemetry spans of generations and their phases; needs the extra `[otel]`, and is off unless it is asked for.

Spans are made when a generation has ended, from the times that were noted on its way: nothing is done for them while it
is denoised. Their parent is the caller's span, by the `traceparent` that the transport has bound to the task.
"""

from __future__ import annotations

import importlib.metadata
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server.errors import Cancelled, TracingUnavailable
from calotype_server.observability.events import GenerationEnded
from calotype_server.types import Failed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import TracerProvider

    from calotype_server.observability.events import Observation, PhaseSpan

__all__ = ["Tracing", "configured", "wanted"]

_log = structlog.get_logger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FLUSH_SECONDS = 2.0


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's own variables name somewhere to send spans to."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    return exporter not in ("", "none") or (not exporter and any(environment.get(name) for name in _ENDPOINTS))


def configured(version: str, *, required: bool) -> Tracing | None:
    """Sets tracing up from OpenTelemetry's variables.

    Args:
        version: Of this software.
        required: Whether to fail when it is not installed; otherwise a warning is logged.

    Returns:
        None when it is not installed.

    Raises:
        TracingUnavailable: It is not installed, or there is no exporter of the name.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        if required:
            raise TracingUnavailable("--tracing needs OpenTelemetry: pip install 'calotype[server,otel]'.") from None
        _log.warning("no tracing: OpenTelemetry is not installed", install="pip install 'calotype[server,otel]'")
        return None
    service = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "calotype"), "service.version": version}
    named = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if named and "OTEL_SERVICE_NAME" not in os.environ:
        del service["service.name"]
    provider = TracerProvider(resource=Resource.create(service), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    return Tracing(provider, version)


class Tracing:
    """Makes spans of ended generations.

    Args:
        provider: Of OpenTelemetry's SDK.
        version: Of this software.
    """

    def __init__(self, provider: TracerProvider, version: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("calotype_server", version)

    def observe(self, observation: Observation) -> None:
        """Takes no notice of anything but ends."""
        if isinstance(observation, GenerationEnded):
            self._trace(observation)

    def close(self) -> None:
        """Sends what has not been sent, if that succeeds within two seconds."""
        # An exporter that cannot reach its collector tries again for much longer than it was told to.
        closing = threading.Thread(target=self._provider.shutdown, name="calotype-tracing", daemon=True)
        closing.start()
        closing.join(_FLUSH_SECONDS)

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
        # The spans' clock is that of the system.
        offset = time.time() - time.monotonic()
        begun, done = (int((seconds + offset) * 1e9) for seconds in (ended.phases[0].begin, ended.phases[-1].end))
        whole = self._tracer.start_span(
            "generation", context=_parent(), kind=trace.SpanKind.SERVER, attributes=attributes, start_time=begun
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
        whole.end(done)


def _attributes(ended: GenerationEnded, phase: PhaseSpan) -> dict[str, Any]:
    if phase.name != "denoise":
        return {}
    known = {"calotype.batch_rows": ended.batch_rows} if ended.batch_rows else {}
    return {"calotype.step_count": ended.steps, **known}


def _parent() -> Any:
    """The caller's span as a context; an empty one where no caller has told."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": structlog.contextvars.get_contextvars().get("traceparent", "")}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _exporter() -> Any:
    """Makes the exporter that the variables ask for, of those that are installed."""
    name = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if name == "otlp":
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
            "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
        )
        name = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    found = list(importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name))
    if not found:
        raise TracingUnavailable(f"OpenTelemetry has no exporter named {name!r}; see OTEL_TRACES_EXPORTER.")
    return found[0].load()()
