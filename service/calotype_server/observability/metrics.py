"""Prometheus metrics: their names, buckets, and how they follow from observations.

Units are seconds and bytes. No label holds an id, a prompt, a caller or anything else that a caller chooses: the number
of series is bounded by this file. `service/README.md` lists them; a test compares the two.
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

_WAITS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_PICTURES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class Description:
    """One line of the documentation: `name` as it is scraped, `kind` as Prometheus calls it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


class Metrics:
    """What every process with a web port counts; `observe` may be called by any thread.

    Args:
        version: Of this software.

    Attributes:
        catalogue: What is exposed under a name of ours.
    """

    def __init__(self, version: str) -> None:
        # One more series for each counter and histogram, of which nobody has asked for a graph yet.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.catalogue: list[Description] = []
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._info("calotype_build", "Version of the software.", ("version",)).info({"version": version})
        threads = self._gauge("calotype_threads", "Threads of Python.")
        threads.set_function(threading.active_count)
        self._calls = self._counter(
            "calotype_calls",
            "Calls that are over, by gRPC status, or that of HTTP.",
            ("transport", "method", "code"),
        )
        self._refused = self._counter("calotype_refused", "Calls that were refused, by reason.", ("reason",))
        self._messages = self._counter("calotype_messages_sent", "Messages handed to a transport.", ("transport",))
        self._bytes = self._counter(
            "calotype_sent_bytes", "Bytes of these messages, without the transport's framing.", ("transport",)
        )

    def observe(self, observation: Observation) -> None:
        """Counts an observation; those that nothing is counted of are ignored."""
        match observation:
            case MessageSent(transport, size):
                self._messages.labels(transport).inc()
                self._bytes.labels(transport).inc(size)
            case CallRefused(reason):
                self._refused.labels(reason).inc()
            case CallEnded(transport, method, code):
                self._calls.labels(transport, method, code).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """Returns all metrics and their content type, in the format that the `Accept` header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return self._described(Counter(name, text, labels, registry=self._registry), f"{name}_total", text, labels)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return self._described(Gauge(name, text, labels, registry=self._registry), name, text, labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        made = Histogram(name, text, labels, registry=self._registry, buckets=buckets)
        return self._described(made, name, text, labels)

    def _info(self, name: str, text: str, labels: Sequence[str]) -> Info:
        return self._described(Info(name, text, registry=self._registry), f"{name}_info", text, labels)

    def _described(self, metric: M, name: str, text: str, labels: Sequence[str]) -> M:
        kind = "gauge" if isinstance(metric, Info) else type(metric).__name__.lower()
        self.catalogue.append(Description(name, kind, tuple(labels), text))
        return metric


class ServerMetrics(Metrics):
    """What a server with a model counts besides.

    Args:
        version: Of this software.
    """

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self._model = self._info(
            "calotype_model", "The loaded model.", ("name", "pipeline", "device", "dtype", "max_active")
        )
        self._gauges = {
            "serving": self._gauge("calotype_serving", "1 while calls are welcome, as the health checks say."),
            "active": self._gauge("calotype_active_generations", "Generations at work."),
            "queued": self._gauge("calotype_queued_generations", "Generations that wait for their turn."),
            "readers": self._gauge("calotype_readers", "Streams that follow a generation."),
            "log_bytes": self._gauge(
                "calotype_event_log_bytes", "Pixels and files of previews that running generations hold."
            ),
            "retained": self._gauge("calotype_retained_generations", "Ended generations that can still be watched."),
            "retained_bytes": self._gauge("calotype_retained_bytes", "Bytes of their images."),
            "longest_pause": self._gauge(
                "calotype_longest_pause_seconds",
                "Time since the last progress of the generation at work that made none for longest.",
            ),
        }
        self._queue_wait = self._histogram(
            "calotype_queue_wait_seconds", "From a generation's acceptance to its turn.", _WAITS
        )
        self._first_preview = self._histogram(
            "calotype_first_preview_seconds", "From a generation's acceptance to its first preview.", _WAITS
        )
        self._phases = self._histogram(
            "calotype_phase_seconds", "Phases of ended generations, however they ended.", _WAITS, ("phase",)
        )
        self._ended = self._counter(
            "calotype_generations_ended",
            "Ended generations; the reason is that of the error, or FINISHED_EARLY, or empty.",
            ("outcome", "reason"),
        )
        self._errors = self._counter(
            "calotype_errors", "Failed generations by the phase that they were in, and failed previews.", ("phase",)
        )
        self._cancel = self._histogram(
            "calotype_cancel_seconds", "From the request to end a generation at work to its slot being free.", _WAITS
        )
        self._step = self._histogram(
            "calotype_step_seconds", "Denoising step, as its generation sees it: waiting for others included.", _STEPS
        )
        self._batch_rows = self._histogram(
            "calotype_batch_rows", "Rows of latents that the denoiser computed in one call.", _ROWS
        )
        self._batch = self._histogram("calotype_batch_seconds", "One call of the denoiser.", _STEPS)
        self._preview = self._histogram(
            "calotype_preview_seconds",
            "Drawing a preview, as the budget reckons: processor time on a CPU, time of the side stream on CUDA.",
            _PICTURES,
            ("method",),
        )
        self._previews = self._counter(
            "calotype_previews",
            "Previews that were drawn, and who chose their method: the request, or the budget (auto).",
            ("method", "chosen_by"),
        )
        self._dropped = self._counter(
            "calotype_previews_dropped",
            "Previews that newer ones replaced: undrawn by the preview thread, or unread by a reader.",
            ("where",),
        )
        self._encode = self._histogram(
            "calotype_encode_seconds", "Writing an image file.", _PICTURES, ("kind", "format")
        )

    def describe(self, model: ModelInfo) -> None:
        """Tells what is loaded."""
        names = ("name", "pipeline", "device", "dtype", "max_active")
        self._model.info({name: str(getattr(model, name)) for name in names})

    def read(self, **sources: Callable[[], float]) -> None:
        """Lets gauges, by their short names, be read from functions whenever somebody asks, in the event loop."""
        for name, source in sources.items():
            self._gauges[name].set_function(source)

    def observe(self, observation: Observation) -> None:
        """Counts an observation."""
        match observation:
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
                self._count_end(observation)
            case _:
                super().observe(observation)

    def _count_end(self, ended: GenerationEnded) -> None:
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
