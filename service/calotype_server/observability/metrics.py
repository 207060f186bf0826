"""Prometheus metrics: names, buckets, and how observations update them.

Units are seconds and bytes. No label contains an id, a prompt, a caller or any other value that callers choose, so the
number of series is bounded. `service/README.md` lists all metrics; a test compares the list with this module.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

from calotype_server.errors import Cancelled
from calotype_server.observability.events import (
    AcceleratorActive,
    BatchDone,
    CallEnded,
    CallRefused,
    CancelCompleted,
    FirstPreview,
    GenerationEnded,
    ImageEncoded,
    LeftQueue,
    MessageSent,
    PreviewFailed,
    PreviewPublished,
    PreviewRendered,
    PreviewsDropped,
    StepDone,
)
from calotype_server.types import Succeeded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.observability.events import Observation
    from calotype_server.types import ModelInfo

__all__ = ["Description", "Metrics", "ServerMetrics"]

M = TypeVar("M", Counter, Gauge, Histogram, Info)

_WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_IMAGE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class Description:
    """One metric for the documentation: its exposed name, its Prometheus type, its labels and its help text."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


class Metrics:
    """Metrics of every process with a web port. `observe` may be called by any thread.

    Args:
        version: Version of Calotype.

    Attributes:
        catalogue: Descriptions of all metrics with the prefix `calotype_`.
    """

    def __init__(self, version: str) -> None:
        # They are one additional series per counter and histogram, which no panel of the dashboard uses.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.catalogue: list[Description] = []
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._info("calotype_build", "Version of Calotype.", ("version",)).info({"version": version})
        threads = self._gauge("calotype_threads", "Python threads.")
        threads.set_function(threading.active_count)
        self._calls = self._counter(
            "calotype_calls",
            "Ended calls, by gRPC or HTTP status.",
            ("transport", "method", "code"),
        )
        self._refused = self._counter("calotype_refused", "Rejected calls, by reason.", ("reason",))
        self._messages = self._counter("calotype_messages_sent", "Messages sent.", ("transport",))
        self._bytes = self._counter(
            "calotype_sent_bytes", "Bytes of sent messages, without the framing of the transport.", ("transport",)
        )

    def observe(self, observation: Observation) -> None:
        """Updates the metrics of an observation; ignores kinds that have none."""
        match observation:
            case MessageSent(transport, size):
                self._messages.labels(transport).inc()
                self._bytes.labels(transport).inc(size)
            case CallRefused(reason):
                self._refused.labels(reason).inc()
            case CallEnded(transport, method, code):
                self._calls.labels(transport, method, code).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """Returns all metrics and their content type, in the format that the `Accept` header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return self._register(Counter(name, text, labels, registry=self._registry), f"{name}_total", text, labels)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return self._register(Gauge(name, text, labels, registry=self._registry), name, text, labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        made = Histogram(name, text, labels, registry=self._registry, buckets=buckets)
        return self._register(made, name, text, labels)

    def _info(self, name: str, text: str, labels: Sequence[str]) -> Info:
        return self._register(Info(name, text, registry=self._registry), f"{name}_info", text, labels)

    def _register(self, metric: M, name: str, text: str, labels: Sequence[str]) -> M:
        kind = "gauge" if isinstance(metric, Info) else type(metric).__name__.lower()
        self.catalogue.append(Description(name, kind, tuple(labels), text))
        return metric


class ServerMetrics(Metrics):
    """Metrics of a server with a model.

    Args:
        version: Version of Calotype.
    """

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self._model = self._info(
            "calotype_model", "The loaded model.", ("name", "pipeline", "device", "dtype", "max_active")
        )
        self._accelerator = self._info(
            "calotype_accelerator", "How the denoiser is computed: see `Model.accelerator`.", ("name",)
        )
        self._gauges = {
            "serving": self._gauge(
                "calotype_serving",
                "1 while the server accepts calls, 0 while it loads, drains or hangs; same as the health check.",
            ),
            "active": self._gauge("calotype_active_generations", "Running generations."),
            "queued": self._gauge("calotype_queued_generations", "Generations in the queue."),
            "readers": self._gauge("calotype_readers", "Open streams that read a generation."),
            "state_problem": self._gauge(
                "calotype_state_problem",
                "1 while the state folder does not respond or cannot be written; the server is then not serving.",
            ),
            "encoder_hung": self._gauge(
                "calotype_encoder_hung_threads",
                "Threads that hang while encoding an image; the server is then not serving.",
            ),
            "log_bytes": self._gauge(
                "calotype_event_log_bytes", "Bytes of previews, raw and encoded, kept for running generations."
            ),
            "retained": self._gauge("calotype_retained_generations", "Ended generations that can still be watched."),
            "retained_bytes": self._gauge("calotype_retained_bytes", "Bytes of images of these generations."),
            "longest_pause": self._gauge(
                "calotype_longest_pause_seconds",
                "Time since the last progress of the running generation that made none for longest.",
            ),
        }
        self._queue_wait = self._histogram(
            "calotype_queue_wait_seconds", "Time from accepting a generation to leaving the queue.", _WAIT_BUCKETS
        )
        self._first_preview = self._histogram(
            "calotype_first_preview_seconds", "Time from accepting a generation to its first preview.", _WAIT_BUCKETS
        )
        self._phases = self._histogram(
            "calotype_phase_seconds", "Duration of each phase of ended generations.", _WAIT_BUCKETS, ("phase",)
        )
        self._ended = self._counter(
            "calotype_generations_ended",
            "Ended generations; reason is the reason of the error, FINISHED_EARLY, or empty.",
            ("outcome", "reason"),
        )
        self._errors = self._counter(
            "calotype_errors", "Failed generations by the phase in which they failed, and failed previews.", ("phase",)
        )
        self._cancel = self._histogram(
            "calotype_cancel_seconds",
            "Time from cancelling a running generation to its slot being free.",
            _WAIT_BUCKETS,
        )
        self._step = self._histogram(
            "calotype_step_seconds",
            "Time between two denoising steps of a generation, including waiting for other generations.",
            _STEP_BUCKETS,
        )
        self._batch_rows = self._histogram(
            "calotype_batch_rows", "Rows of latents per call of the denoiser.", _ROW_BUCKETS
        )
        self._batch = self._histogram("calotype_batch_seconds", "Duration of one call of the denoiser.", _STEP_BUCKETS)
        self._preview = self._histogram(
            "calotype_preview_seconds",
            "Cost of rendering a preview, as the budget counts it: CPU time on a CPU, time on the side stream on CUDA.",
            _IMAGE_BUCKETS,
            ("method",),
        )
        self._previews = self._counter(
            "calotype_previews",
            "Published previews; chosen_by says whether the request or the budget (auto) chose the method.",
            ("method", "chosen_by"),
        )
        self._dropped = self._counter(
            "calotype_previews_dropped",
            "Previews replaced by newer ones, before they were rendered (undrawn) or read by a reader (unread).",
            ("where",),
        )
        self._encode = self._histogram(
            "calotype_encode_seconds", "Time to encode an image as a file.", _IMAGE_BUCKETS, ("kind", "format")
        )

    def set_model(self, model: ModelInfo) -> None:
        """Sets the labels that describe the loaded model."""
        names = ("name", "pipeline", "device", "dtype", "max_active")
        self._model.info({name: str(getattr(model, name)) for name in names})

    def bind_gauges(self, **sources: Callable[[], float]) -> None:
        """Binds gauges, by their short names, to functions that are called in the event loop at each scrape."""
        for name, source in sources.items():
            self._gauges[name].set_function(source)

    def observe(self, observation: Observation) -> None:
        """Updates the metrics of an observation."""
        match observation:
            case AcceleratorActive(name):
                self._accelerator.info({"name": name})
            case StepDone(seconds):
                self._step.observe(seconds)
            case BatchDone(rows, seconds):
                self._batch_rows.observe(rows)
                self._batch.observe(seconds)
            case PreviewRendered(method, seconds):
                self._preview.labels(method.value).observe(seconds)
            case PreviewPublished(method, automatic):
                self._previews.labels(method.value, "auto" if automatic else "request").inc()
            case PreviewsDropped(where, count):
                self._dropped.labels(where).inc(count)
            case PreviewFailed():
                self._errors.labels("preview").inc()
            case ImageEncoded(kind, format_, seconds):
                self._encode.labels(kind, format_).observe(seconds)
            case LeftQueue(waited):
                self._queue_wait.observe(waited)
            case FirstPreview(seconds):
                self._first_preview.observe(seconds)
            case CancelCompleted(seconds):
                self._cancel.observe(seconds)
            case GenerationEnded():
                self._observe_end(observation)
            case _:
                super().observe(observation)

    def _observe_end(self, ended: GenerationEnded) -> None:
        for phase in ended.phases:
            self._phases.labels(phase.name).observe(phase.end - phase.begin)
        end = ended.end
        if isinstance(end, Succeeded):
            self._ended.labels("succeeded", "FINISHED_EARLY" if end.finished_early else "").inc()
            return
        cancelled = isinstance(end.error, Cancelled)
        self._ended.labels("cancelled" if cancelled else "failed", end.error.reason).inc()
        if not cancelled:
            self._errors.labels(ended.phases[-1].name).inc()
